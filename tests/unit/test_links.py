"""Rates of links: measured once, kept if they are worth it, and never a reason to fail."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from calibrations import calibration

from penstock.memory.requests import CHUNK
from penstock.memory.throttle import Throttle
from penstock.runtime.calibration.cache import CalibrationCache
from penstock.runtime.calibration.fingerprint import fingerprint
from penstock.runtime.devices.cpu import CpuDevice
from penstock.runtime.devices.emulated import EmulatedDevice, Rates
from penstock.runtime.links import LinkCache, _calibrated, disk_read_rate, folder_read_time, link_rate
from penstock.scheduler.kv.reuse import ReadTime


@pytest.fixture
def cache(tmp_path: Path) -> LinkCache:
    return LinkCache(tmp_path / "cache" / "links.json")


@pytest.fixture
def emulated() -> Iterator[EmulatedDevice]:
    device = EmulatedDevice(Rates(h2d=4 * 2**30))
    yield device
    device.close()


def test_rates_are_kept(cache: LinkCache, tmp_path: Path) -> None:
    assert cache.get("a") is None
    cache.put("a", 2.5)
    cache.put("b", 3.0)
    assert LinkCache(tmp_path / "cache" / "links.json").get("a") == 2.5
    assert cache.get("b") == 3.0
    assert os.listdir(tmp_path / "cache") == ["links.json"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": "x"}', '{"a": 0}', '{"a": -1}', '{"a": null}'])
def test_a_damaged_cache_is_ignored_and_mended(tmp_path: Path, text: str) -> None:
    path = tmp_path / "links.json"
    path.write_text(text)
    cache = LinkCache(path)
    assert cache.get("a") is None
    cache.put("a", 1.0)
    assert cache.get("a") == 1.0


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = LinkCache(tmp_path / "file" / "links.json")
    cache.put("a", 1.0)
    assert cache.get("a") is None


def test_the_disk_is_measured_but_a_short_measurement_is_not_kept(cache: LinkCache, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(5 * 2**20 + 17))
    (tmp_path / "tiny").write_bytes(b"x")
    rate = disk_read_rate([str(tmp_path / "tiny"), str(path)], cache, CpuDevice())
    assert rate is not None
    assert rate > 0
    assert cache.get(f"disk:{path.stat().st_dev}") is None
    assert disk_read_rate([str(tmp_path / "tiny")], cache, CpuDevice()) is None
    cache.put(f"disk:{path.stat().st_dev}", 123.0)
    assert disk_read_rate([str(path)], cache, CpuDevice()) == 123.0


def test_a_throttled_disk_is_measured_for_itself(cache: LinkCache, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(2**20))
    cache.put(f"disk:{path.stat().st_dev}", 1e12)
    device = CpuDevice()
    device.disk_throttle = Throttle(20e6)
    rate = disk_read_rate([str(path)], cache, device)
    assert rate is not None
    assert rate <= 20e6 * 1.01


def test_an_emulated_link_shows_its_rate(cache: LinkCache, emulated: EmulatedDevice) -> None:
    rate = link_rate(emulated, cache)
    assert rate is not None
    assert rate <= 4 * 2**30 * 1.01
    assert cache.get("h2d:emulated") is None  # another run may name another rate
    assert link_rate(emulated, cache, back=True) is not None
    assert link_rate(CpuDevice(), cache) is None


def calibrated(tmp_path: Path, device: EmulatedDevice | CpuDevice, key: str, *, age_s: float = 0.0) -> LinkCache:
    """A cache with a calibration of the drive that `tmp_path` is on."""
    kept = CalibrationCache(tmp_path / "cache" / "calibration")
    here = fingerprint(torch.device("cpu"), [str(tmp_path)])
    made = calibration(device=key, gpu=device.separate, fingerprint=here)
    kept.write(msgspec.structs.replace(made, taken_unix_s=time.time() - age_s), device)
    return LinkCache(tmp_path / "cache" / "links.json", calibrations=kept)


def test_a_calibration_comes_first(tmp_path: Path, emulated: EmulatedDevice) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(2**20))
    cache = calibrated(tmp_path, emulated, "emulated:h2d=4294967296")
    drive = calibration().hardware.drives[0]
    assert disk_read_rate([str(path)], cache, emulated) == drive.read.at(CHUNK)
    assert folder_read_time(tmp_path, cache, emulated) == ReadTime(rate=drive.read.at(CHUNK), start_s=drive.latency_s)
    assert link_rate(emulated, cache) == pytest.approx(25 * 2**30)
    assert link_rate(emulated, cache, back=True) == pytest.approx(24 * 2**30)
    assert link_rate(CpuDevice(), cache) is None
    other = EmulatedDevice(Rates(h2d=2**30))  # its rates are others, and so is its calibration
    try:
        assert cache.calibration(other) is None
    finally:
        other.close()


def test_a_stale_calibration_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(2**20))
    device = CpuDevice()
    cache = calibrated(tmp_path, device, "cpu", age_s=40 * 86400)
    cache.put(f"disk:{path.stat().st_dev}", 123.0)
    assert folder_read_time(tmp_path, cache, device) == ReadTime(rate=123.0)
    assert folder_read_time(tmp_path, LinkCache(tmp_path / "no.json"), device) is None
    assert disk_read_rate([str(path)], cache, device) == 123.0


def test_a_drive_that_was_not_calibrated_is_measured(tmp_path: Path) -> None:
    cache = calibrated(tmp_path, CpuDevice(), "cpu")
    if not os.path.exists("/proc/version") or os.stat("/proc").st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has one filesystem only")
    kept = cache.calibration(CpuDevice())
    assert kept is not None
    assert {drive.device for drive in kept.fingerprint.drives} == {tmp_path.stat().st_dev}
    for write in (False, True):
        assert _calibrated(kept, {tmp_path.stat().st_dev, os.stat("/proc").st_dev}, write=write) is None
