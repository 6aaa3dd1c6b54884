"""The cache of calibrations: whole files or none, and every reason not to trust one is told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from calibrations import DAY_S, TAKEN_S, calibration

from penstock.memory.errors import DiskError
from penstock.runtime.calibration.cache import CalibrationCache, device_key
from penstock.runtime.calibration.fingerprint import fingerprint
from penstock.runtime.devices.cpu import CpuDevice
from penstock.runtime.devices.emulated import EmulatedDevice, Rates
from penstock.scheduler.calibration import Calibration, encode_calibration


@pytest.fixture
def cache(tmp_path: Path) -> CalibrationCache:
    return CalibrationCache(tmp_path / "deep" / "cache", wall_clock=lambda: TAKEN_S + DAY_S)


@pytest.fixture
def emulated() -> Iterator[EmulatedDevice]:
    device = EmulatedDevice(Rates(h2d=1e9, disk=2e9))
    yield device
    device.close()


def of_here(folder: Path, device: str = "cpu") -> Calibration:
    return calibration(device=device, fingerprint=fingerprint(torch.device("cpu"), [str(folder)]))


def test_what_was_kept_is_found_and_trusted(cache: CalibrationCache, tmp_path: Path) -> None:
    device = CpuDevice()
    nothing = cache.read(device)
    assert (nothing.calibration, nothing.reasons, nothing.trusted) == (None, (), None)
    made = of_here(tmp_path)
    path = cache.write(made, device)
    kept = cache.read(device)
    assert (kept.path, kept.trusted, kept.reasons) == (path, made, ())
    assert os.listdir(path.parent) == [path.name]


def test_devices_have_files_of_their_own(cache: CalibrationCache, emulated: EmulatedDevice) -> None:
    assert device_key(CpuDevice()) == "cpu"
    assert device_key(emulated) == "emulated:h2d=1000000000,disk=2000000000"
    assert cache.path(emulated).name.endswith("-emulated-h2d-1000000000-disk-2000000000.json")
    assert cache.path(emulated) != cache.path(CpuDevice())


def test_a_stale_one_is_told_and_not_trusted(cache: CalibrationCache, tmp_path: Path) -> None:
    made = of_here(tmp_path)
    threads = made.fingerprint.threads + 1
    cache.write(msgspec.structs.replace(made, fingerprint=msgspec.structs.replace(made.fingerprint, threads=threads)),
                CpuDevice())  # fmt: skip
    kept = cache.read(CpuDevice())
    assert kept.trusted is None
    assert kept.calibration is not None
    assert kept.reasons == (f"threads of torch: {threads} then, {threads - 1} now",)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is damaged"),
        (b'{"schema": 99}', "newer penstock"),
        (bytes(5 * 2**20), "is no calibration: it has 5242880 bytes"),
        (encode_calibration(calibration(device="cuda:0")), "is of cuda:0"),
    ],
)
def test_damage_is_a_reason_and_is_mended(cache: CalibrationCache, tmp_path: Path, data: bytes, words: str) -> None:
    device = CpuDevice()
    path = cache.path(device)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    kept = cache.read(device)
    assert kept.calibration is None
    assert words in kept.reasons[0]
    cache.write(of_here(tmp_path), device)
    assert cache.read(device).trusted is not None


def test_a_cache_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    device = CpuDevice()
    beneath = CalibrationCache(tmp_path / "file" / "cache")
    assert "cannot be read" in beneath.read(device).reasons[0]
    with pytest.raises(DiskError, match="XDG_CACHE_HOME"):
        beneath.write(of_here(tmp_path), device)
    folder = CalibrationCache(tmp_path)
    folder.path(device).mkdir()
    with pytest.raises(DiskError):
        folder.write(of_here(tmp_path), device)
    assert sorted(os.listdir(tmp_path)) == sorted(["file", folder.path(device).name])  # nothing half written
