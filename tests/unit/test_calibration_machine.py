"""What a machine tells of itself: quotas, drives, caches, who else computes, and the fingerprint made of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from penstock.memory.cpuquota import read_cpu_quota
from penstock.memory.drives import drive_model
from penstock.runtime.calibration.fingerprint import cpu_model, fingerprint, identify_drive
from penstock.runtime.calibration.lastlevel import UNKNOWN_NBYTES, last_level_cache
from penstock.runtime.calibration.others import Ticks, others_between, read_ticks

MIB = 2**20


def proc(root: Path, cgroup: str, mounts: str) -> Path:
    folder = root / "proc" / "self"
    folder.mkdir(parents=True)
    (folder / "cgroup").write_text(cgroup)
    (folder / "mountinfo").write_text(mounts)
    return root / "proc"


@pytest.mark.parametrize(
    ("outer", "inner", "quota"),
    [
        ("max 100000", "max 100000", None),
        ("max 100000", "250000 100000", 2.5),
        ("100000 100000", "250000 100000", 1.0),  # the tightest on the path
        ("max 100000", "garbage", None),
        ("max 100000", "100000 0", None),
    ],
)
def test_cpu_quota_of_version_2(tmp_path: Path, outer: str, inner: str, quota: float | None) -> None:
    top = tmp_path / "cgroup"
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "cpu.max").write_text(outer + "\n")
    (top / "a" / "b" / "cpu.max").write_text(inner + "\n")
    root = proc(tmp_path, "0::/a/b\n", f"1 0 0:1 / {top} rw - cgroup2 cgroup2 rw\n")
    assert read_cpu_quota(root) == quota


@pytest.mark.parametrize(("micros", "quota"), [("-1", None), ("150000", 1.5)])
def test_cpu_quota_of_version_1(tmp_path: Path, micros: str, quota: float | None) -> None:
    top = tmp_path / "cpu"
    top.mkdir()
    (top / "cpu.cfs_quota_us").write_text(f"{micros}\n")
    (top / "cpu.cfs_period_us").write_text("100000\n")
    mounts = f"1 0 0:1 / {top} rw - cgroup cgroup rw,cpu,cpuacct\n"
    assert read_cpu_quota(proc(tmp_path, "4:cpu,cpuacct:/\n3:memory:/x\n", mounts)) == quota


def test_no_control_groups_no_quota(tmp_path: Path) -> None:
    assert read_cpu_quota(tmp_path) is None
    assert read_cpu_quota(proc(tmp_path, "0::/\n4:cpu:/\n", "")) is None


def test_drives_are_named_through_partitions_and_mapped_volumes(tmp_path: Path) -> None:
    disk = tmp_path / "devices" / "nvme0n1"
    (disk / "device").mkdir(parents=True)
    (disk / "device" / "model").write_text("Some SSD   1TB  \n")
    (disk / "nvme0n1p2").mkdir()
    (disk / "nvme0n1p2" / "partition").write_text("2\n")
    mapped = tmp_path / "devices" / "dm-0"
    (mapped / "slaves").mkdir(parents=True)
    (mapped / "slaves" / "nvme0n1p2").symlink_to(disk / "nvme0n1p2")
    (tmp_path / "devices" / "vda").mkdir()
    block = tmp_path / "dev" / "block"
    block.mkdir(parents=True)
    for number, target in enumerate((disk, disk / "nvme0n1p2", mapped, tmp_path / "devices" / "vda")):
        (block / f"8:{number}").symlink_to(target)
    names = [drive_model(os.makedev(8, number), tmp_path) for number in range(5)]
    assert names == ["Some SSD 1TB (nvme0n1)"] * 3 + ["vda", ""]


def test_the_largest_cache_counts(tmp_path: Path) -> None:
    assert last_level_cache(tmp_path) == UNKNOWN_NBYTES
    for index, size in enumerate(("48K", "1024K", "32M", "nonsense", "")):
        folder = tmp_path / "devices" / "system" / "cpu" / "cpu0" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(size + "\n")
    assert last_level_cache(tmp_path) == 32 * MIB


def test_what_others_took(tmp_path: Path) -> None:
    assert read_ticks(tmp_path) is None
    core = next(iter(os.sched_getaffinity(0)))
    per_second = os.sysconf("SC_CLK_TCK")

    def stat(seconds: int) -> None:
        row = " ".join(str(seconds * per_second * part) for part in (4, 1, 1, 50, 9, 1, 1, 2, 0, 0))
        (tmp_path / "stat").write_text(f"cpu  9 9 9 9 9 9 9 9 9 9\ncpu{core} {row}\ncpu99999 {row}\nintr 1 2 3\n")

    stat(0)
    before = read_ticks(tmp_path, clock=lambda: 10.0, own=lambda: 1.0)
    stat(1)
    after = read_ticks(tmp_path, clock=lambda: 20.0, own=lambda: 4.0)
    assert before == Ticks(at_s=10.0, busy_s=0.0, own_s=1.0, stolen_s=0.0)
    assert before is not None
    assert after is not None
    others = others_between(before, after)
    assert others.programs == pytest.approx((8 - 3) / 10)
    assert others.machines == pytest.approx(0.2)
    assert others_between(after, after).programs == 0.0
    (tmp_path / "stat").write_text(f"cpu{core} 1 2\n")
    assert read_ticks(tmp_path) is None


def test_the_fingerprint_of_this_machine(tmp_path: Path) -> None:
    found = fingerprint(torch.device("cpu"), [str(tmp_path), str(tmp_path / "missing")])
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.threads == torch.get_num_threads()
    assert found.torch == torch.__version__
    assert found.gpus == ()
    (drive,) = found.drives
    assert (drive.folder, drive.device) == (str(tmp_path), tmp_path.stat().st_dev)
    assert identify_drive(str(tmp_path / "missing")) is None


def test_a_cpu_without_a_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: CPU 9000 @ 5 GHz\nmodel name : other\n")
    assert cpu_model(tmp_path) == "CPU 9000 @ 5 GHz"
    (tmp_path / "cpuinfo").write_text("processor : 0\n")
    assert cpu_model(tmp_path)
    assert cpu_model(tmp_path / "missing")
