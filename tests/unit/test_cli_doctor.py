"""`penstock doctor`: the probes, the findings on machines made up for the test, and the two outputs."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest

from penstock.cli import main
from penstock.cli.doctor import render, tier_capacities
from penstock.cli.findings import find_missing
from penstock.cli.machine import (
    CudaDevice,
    DirectIO,
    LinkRate,
    Machine,
    Processor,
    Software,
    examine,
    read_huge_pages,
    try_direct_io,
)
from penstock.memory.capacity import DiskCapacity, HostCapacity, host_capacity

GIB = 2**30

GPU = CudaDevice(index=0, name="Big GPU", total_nbytes=80 * GIB, free_nbytes=79 * GIB, compute_capability="9.0")
GOOD = Machine(
    processor=Processor(model="CPU [64]", physical_cores=8, usable_cores=16, flags=("sse4_2", "avx512_bf16")),
    host=HostCapacity(
        total_nbytes=64 * GIB, available_nbytes=60 * GIB, available_source="MemAvailable", limit_nbytes=None,
        limit_source=None, obtainable_nbytes=60 * GIB,
    ),
    memlock_nbytes=None,
    huge_pages="madvise",
    software=Software(
        python="3.12.0", kernel="6.8", torch="2.13.0", torch_cuda="13.0", torch_error=None, transformers="5.23.0",
        triton=True,
    ),
    nvidia_driver=True,
    devices=(GPU,),
    disk=DiskCapacity(
        folder="/data", total_nbytes=1000 * GIB, free_nbytes=500 * GIB, filesystem="xfs", in_memory=False
    ),
    direct_io=DirectIO(works=True, reason=None),
)  # fmt: skip


def report(machine: Machine) -> str:
    return "\n".join(line.plain for line in render(machine, tier_capacities(machine), find_missing(machine)))


def test_a_good_machine_misses_nothing() -> None:
    assert find_missing(GOOD) == ()
    text = report(GOOD)
    assert text.endswith("What is missing\n  nothing")
    assert "CPU [64], 16 usable of 8 physical cores" in text
    assert "memlock      unlimited" in text
    assert "GiB/s" not in text


def test_tiers_give_what_is_free() -> None:
    assert [(tier.tier, tier.nbytes) for tier in tier_capacities(GOOD)] == [
        ("device", 79 * GIB),
        ("host", 60 * GIB),
        ("disk", 500 * GIB),
    ]
    alone = dataclasses.replace(GOOD, devices=(), nvidia_driver=False)
    assert [tier.tier for tier in tier_capacities(alone)] == ["host", "disk"]
    assert "the same as host" in report(alone)


def test_links_are_shown_once_measured() -> None:
    measured = dataclasses.replace(GOOD, links=(LinkRate(link="disk→host", nbytes_per_s=2.5 * GIB),))
    assert "disk→host" in report(measured)
    assert "2.50 GiB/s" in report(measured)


@pytest.mark.parametrize(
    ("lack", "what", "remedy"),
    [
        ({"devices": (), "nvidia_driver": False}, "no CUDA device", "install the NVIDIA driver"),
        ({"devices": ()}, "finds no device", "CUDA_VISIBLE_DEVICES"),
        (
            {"devices": (), "software": dataclasses.replace(GOOD.software, torch_cuda=None)},
            "built without CUDA",
            "CUDA build of torch",
        ),
        (
            {"devices": (), "software": dataclasses.replace(GOOD.software, torch=None, torch_error="libx.so")},
            "torch cannot be imported: libx.so",
            "pip install torch",
        ),
        ({"software": dataclasses.replace(GOOD.software, transformers=None)}, "transformers", "pip install"),
        ({"software": dataclasses.replace(GOOD.software, triton=False)}, "triton", "pip install triton"),
        (
            {"host": dataclasses.replace(GOOD.host, limit_nbytes=3 * GIB, limit_source="/c/memory.max")},
            "limits memory to 3.00 GiB of 64.00 GiB",
            "raise the memory limit",
        ),
        ({"huge_pages": "never"}, "transparent huge pages", "echo madvise"),
        (
            {"disk": dataclasses.replace(GOOD.disk, filesystem="tmpfs", in_memory=True)},
            "/data is on tmpfs",
            "XDG_CACHE_HOME or --disk",
        ),
        ({"direct_io": DirectIO(works=False, reason="Invalid argument")}, "Invalid argument", "ext4 or xfs"),
        ({"processor": dataclasses.replace(GOOD.processor, flags=("sse4_2",))}, "no bf16", "float32"),
    ],
)
def test_everything_missing_comes_with_a_remedy(lack: dict[str, object], what: str, remedy: str) -> None:
    (finding,) = find_missing(dataclasses.replace(GOOD, **lack))  # type: ignore[arg-type]
    assert what in finding.what
    assert remedy in finding.remedy
    assert finding.consequence


def test_direct_io_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    probe = try_direct_io(tmp_path)
    assert probe.works == (probe.reason is None)
    assert list(tmp_path.iterdir()) == []


def test_direct_io_refused_is_reported_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, flags: int, *rest: int, **named: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    assert try_direct_io(tmp_path) == DirectIO(works=False, reason=f"Invalid argument in {tmp_path}")
    assert list(tmp_path.iterdir()) == []
    assert not try_direct_io(tmp_path / "missing").works


def test_huge_page_mode(tmp_path: Path) -> None:
    folder = tmp_path / "kernel" / "mm" / "transparent_hugepage"
    assert read_huge_pages(tmp_path) is None
    folder.mkdir(parents=True)
    (folder / "enabled").write_text("always [madvise] never\n")
    assert read_huge_pages(tmp_path) == "madvise"


def test_examine_measures_links_only_when_asked(tmp_path: Path) -> None:
    rate = LinkRate(link="disk→host", nbytes_per_s=1.0)
    seen: list[Path] = []

    def measure(folder: Path) -> tuple[LinkRate, ...]:
        seen.append(folder)
        return (rate,)

    assert examine(tmp_path / "new").links == ()
    assert examine(tmp_path / "new", measure_links=measure).links == (rate,)
    assert seen == [tmp_path]
    assert not (tmp_path / "new").exists()


def test_json_is_one_document_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--disk", str(tmp_path)]) == 0
    out, error = capsys.readouterr()
    document = json.loads(out)
    assert error == ""
    assert document["host"]["total_nbytes"] == host_capacity().total_nbytes
    assert document["processor"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert document["disk"]["folder"] == str(tmp_path)
    assert {tier["tier"] for tier in document["tiers"]} >= {"host", "disk"}
    assert all(set(finding) == {"what", "consequence", "remedy"} for finding in document["missing"])
    assert {link["link"] for link in document.get("links", ())} >= {"disk→host"} or document["disk"]["in_memory"]


def test_text_has_no_colours_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert "\x1b" not in out
    for heading in ("This machine", "What each tier can give", "What is missing"):
        assert heading in out
