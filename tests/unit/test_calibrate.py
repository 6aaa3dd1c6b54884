"""A whole calibration: in order, within its budgets, and with notes where something fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.memory.arena import HostArena
from penstock.memory.errors import CalibrationError, DiskError, DoesNotFitError, UsageError
from penstock.runtime.calibration import calibrate as module
from penstock.runtime.calibration import processor
from penstock.runtime.calibration.calibrate import Pace, calibrate
from penstock.runtime.calibration.others import Others
from penstock.runtime.devices.cpu import CpuDevice
from penstock.runtime.devices.emulated import EmulatedDevice, Rates
from penstock.scheduler.calibration import decode_calibration, encode_calibration

MIB = 2**20


@pytest.fixture
def emulated() -> Iterator[EmulatedDevice]:
    device = EmulatedDevice(Rates(h2d=8e9, d2h=8e9))
    yield device
    device.close()


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(
        drive=0.01, together=0.01, link=0.01, processor=0.01, sharing=0.02, file_nbytes=16 * MIB, write_nbytes=0,
        depths=(1,), quick=True,
    )  # fmt: skip
    monkeypatch.setattr(module, "QUICK", pace)
    monkeypatch.setattr(module, "MOST_NBYTES", 16 * MIB)
    monkeypatch.setattr(module, "LEAST_NBYTES", 16 * MIB)
    monkeypatch.setattr(processor, "QUICK_ROWS", (1, 4))
    monkeypatch.setattr(processor, "QUICK_DTYPES", (torch.float32,))
    monkeypatch.setattr(processor, "QUICK_LENGTHS", (16, 32))


def test_everything_there_is(emulated: EmulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor.torch, "get_num_threads", lambda: 2)  # tests compute on one
    told: list[str] = []
    found = calibrate(emulated, [str(tmp_path)], quick=True, progress=told.append, wall_clock=lambda: 1e9)
    assert decode_calibration(encode_calibration(found), source="x") == found
    hardware = found.hardware
    assert hardware.emulated
    assert hardware.gpu == hardware.cpu
    assert hardware.link is not None
    assert hardware.cpu.linear.keys() == hardware.cpu.attention.keys() == hardware.cpu.elementwise.keys() == {"float32"}
    assert hardware.cpu.attention_back.keys() == {"float32"}
    assert hardware.cpu.memory.x[0] == 1
    assert min(hardware.cpu.adam, hardware.cpu.launch_s, hardware.cpu.module_call_s, hardware.disk_read) > 0
    assert hardware.cpu.rouse_s > 0
    assert 0 < hardware.cpu.switch_s < 0.1
    assert 0 < hardware.sharing.serve_s < 0.1
    assert found.device == "emulated:h2d=8000000000,d2h=8000000000"
    assert (found.quick, found.taken_unix_s) == (True, 1e9)
    assert [drive.folder for drive in found.fingerprint.drives] == [str(tmp_path)]
    assert told == [
        "cpu memory",
        "cpu linear float32",
        "cpu attention float32",
        "cpu attention backward float32",
        "cpu elementwise float32",
        "cpu AdamW",
        "cpu launch",
        "cpu framework",
        "cpu threads",
        "cpu rousing threads",
        "link to emulated",
        "products while copying",
        f"file on the drive of {tmp_path}",
        f"drive of {tmp_path}",
        "products while reading",
        "bringing blocks",
    ]
    assert os.listdir(tmp_path) == []
    assert not [note for note in found.notes if "not measured" in note]


def test_failures_are_notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **named: Any) -> None:
        raise RuntimeError("no such kernel\nand more")

    def broken(*args: Any, **named: Any) -> None:
        raise DiskError("the drive is broken")

    for name in ("linear_curve", "attention_curve", "adam_rate", "launch_cost"):
        monkeypatch.setattr(processor, name, refuse)
    monkeypatch.setattr(module, "probe_file", broken)
    found = calibrate(CpuDevice(), [str(tmp_path), str(tmp_path / "same drive")], quick=True)
    assert found.hardware.drives == found.fingerprint.drives == ()
    assert found.hardware.cpu.linear == {}
    assert (found.hardware.cpu.adam, found.hardware.gpu, found.hardware.link) == (0.0, None, None)
    notes = [note for note in found.notes if "not measured" in note]
    assert notes == [
        "cpu linear float32 was not measured: no such kernel",
        "cpu attention float32 was not measured: no such kernel",
        "cpu AdamW was not measured: no such kernel",
        "cpu launch was not measured: no such kernel",
        f"file on the drive of {tmp_path} was not measured: the drive is broken",
    ]


def test_without_memory_and_products_there_is_nothing_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **named: Any) -> None:
        raise RuntimeError("no")

    for name in ("memory_rates", "linear_curve", "attention_curve", "adam_rate", "launch_cost"):
        monkeypatch.setattr(processor, name, refuse)
    with pytest.raises(CalibrationError, match="cpu memory was not measured: no"):
        calibrate(CpuDevice(), quick=True)


def test_folders_in_memory_are_refused_before_anything_is_measured() -> None:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("this machine has no /dev/shm")
    with pytest.raises(UsageError, match="/dev/shm is on tmpfs, which is memory"):
        calibrate(CpuDevice(), ["/dev/shm"], quick=True, progress=pytest.fail)


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_NBYTES", 2**60)
    with pytest.raises(DoesNotFitError, match="end other programs") as error:
        calibrate(CpuDevice(), quick=True, progress=pytest.fail)
    assert error.value.tier == "host"


def test_what_makes_figures_doubtful() -> None:
    from calibrations import MACHINE, hardware
    from msgspec.structs import replace

    def doubts(now: Any = MACHINE, others: Others | None = None) -> str:
        return "\n".join(module._doubts(hardware(), now, 2**40, others))

    assert doubts() == (
        "repetitions lie far apart, so that something else uses the machine, or it slows itself down: "
        "SSD 1 (nvme0n1) read 35%"
    )
    busy = doubts(others=Others(programs=3.0, machines=1.5))
    assert "other programs took 3.0 of 8 cores" in busy
    assert "1.5 of 8 cores to other machines" in busy
    assert "allows 2.5 CPUs on 8 cores" in doubts(replace(MACHINE, cpu_quota=2.5))
    assert "CPUs" not in doubts(replace(MACHINE, cpu_quota=8.0))
    assert "may be those of the cache" in "\n".join(module._doubts(hardware(), MACHINE, 1, None))


def test_the_arena_of_requests_is_given_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed = []
    real = HostArena.close
    monkeypatch.setattr(HostArena, "close", lambda arena: (closed.append(arena.nbytes), real(arena))[1])
    run = module.Run(device=CpuDevice(), folders=[str(tmp_path)], pace=module.QUICK, nbytes=16 * MIB)
    drives, together, *_ = run._drives()
    assert len(drives) == 1
    assert together == 1.0
    assert 64 * MIB in closed
