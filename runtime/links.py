"""Rates of this machine's links: from a calibration that holds; else measured in a moment on first use, and kept."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ..memory.arena import HostArena
from ..memory.disk import DiskEngine
from ..memory.image import whole_window
from ..memory.requests import CHUNK
from ..memory.transfer import Transfer
from ..scheduler.calibration import Calibration
from ..scheduler.kv.reuse import ReadTime
from .calibration.cache import CalibrationCache
from .devices.base import Device

logger = logging.getLogger(__name__)

DISK_S: Final = 0.4
LINK_NBYTES: Final = 16 * 2**20
BLOCK: Final = 8 * 2**20
"""Small enough that measuring stays within the smallest budgets."""
WORTH_KEEPING: Final = 256 * 2**20
"""A rate measured over fewer bytes is used, but not kept."""


class LinkCache:
    """Rates by link, in one JSON file, and the calibrations that come before it.

    Args:
        path: Of the file.
        calibrations: Kept by `penstock calibrate`; None for nobody's.
    """

    def __init__(self, path: Path, *, calibrations: CalibrationCache | None = None) -> None:
        self._path = path
        self._calibrations = calibrations

    def calibration(self, device: Device) -> Calibration | None:
        """What `penstock calibrate` found out for a device, where that still holds."""
        if self._calibrations is None:
            return None
        kept = self._calibrations.read(device)
        for reason in kept.reasons:
            logger.info("the calibration in %s is not used: %s", kept.path, reason)
        return kept.trusted

    def get(self, key: str) -> float | None:
        """A kept rate in bytes per second."""
        try:
            value = json.loads(self._path.read_text()).get(key)
        except (OSError, ValueError, AttributeError):
            return None
        return float(value) if isinstance(value, int | float) and value > 0 else None

    def put(self, key: str, rate: float) -> None:
        """Keep a rate. A cache that cannot be written is no reason to fail."""
        try:
            known = json.loads(self._path.read_text())
        except (OSError, ValueError):
            known = {}
        if not isinstance(known, dict):
            known = {}
        known[key] = rate
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(known, indent=1))
            temporary.replace(self._path)
        except OSError as error:
            logger.info("link rates are not kept: %s", error)


def disk_read_rate(files: Sequence[str], cache: LinkCache, device: Device) -> float | None:
    """Bytes per second of reading these files with the engine that will read them."""
    sizes = [(path, os.stat(path)) for path in files]
    sizes = [(path, stat) for path, stat in sizes if stat.st_size >= 4096]
    if not sizes:
        return None
    calibrated = _calibrated(cache.calibration(device), {stat.st_dev for _, stat in sizes}, write=False)
    if calibrated is not None:
        return calibrated
    throttle = device.disk_throttle
    key = f"disk:{sizes[0][1].st_dev}" + (f":{throttle.rate:.0f}" if throttle else "")
    kept = cache.get(key)
    if kept is not None:
        return kept
    total, seconds = _read_for(sizes, DiskEngine(throttle=throttle), DISK_S)
    rate = total / seconds
    if total >= WORTH_KEEPING:
        cache.put(key, rate)
    return rate


def folder_read_time(folder: str | os.PathLike[str], cache: LinkCache, device: Device) -> ReadTime | None:
    """What reading large files in a folder takes: calibrated, or as the rate of its drive was kept; None where nobody
    has measured it."""
    there = os.stat(folder).st_dev
    calibration = cache.calibration(device)
    rate = _calibrated(calibration, {there}, write=False)
    if rate is not None and calibration is not None:
        pairs = zip(calibration.fingerprint.drives, calibration.hardware.drives, strict=True)
        return ReadTime(rate=rate, start_s=max(drive.latency_s for each, drive in pairs if each.device == there))
    kept = cache.get(f"disk:{there}")
    return None if kept is None else ReadTime(rate=kept)


def disk_write_rate(files: Sequence[str], cache: LinkCache, device: Device) -> float | None:
    """Bytes per second of writing to the drives of these files; None without a calibration: measuring wears them."""
    return _calibrated(cache.calibration(device), {os.stat(path).st_dev for path in files}, write=True)


def _calibrated(calibration: Calibration | None, wanted: set[int], *, write: bool) -> float | None:
    """Bytes per second of reading from these drives (`st_dev`), or of writing; None where one was not calibrated."""
    if calibration is None:
        return None
    hardware = calibration.hardware
    identities = calibration.fingerprint.drives
    drives = zip(identities, hardware.drives, strict=True)
    rates = {each.device: (drive.write if write else drive.read).at(CHUNK) for each, drive in drives}
    if not wanted <= rates.keys():
        return None
    return sum(rates[device] for device in wanted) * (hardware.drives_together if len(wanted) > 1 else 1.0)


def _read_for(sizes: Sequence[tuple[str, os.stat_result]], engine: DiskEngine, seconds: float) -> tuple[int, float]:
    arena = HostArena(4 * BLOCK, tier="measuring")
    pending: list[Transfer] = []
    total = 0
    start = time.perf_counter()
    try:
        spans = [(p, at) for p, s in sizes for at in range(0, s.st_size // 4096 * 4096, BLOCK)]
        lengths = {p: s.st_size // 4096 * 4096 for p, s in sizes}
        for index, (path, at) in enumerate(spans):
            if time.perf_counter() - start > seconds:
                break
            if len(pending) == 3:
                pending.pop(0).wait()
            nbytes = min(BLOCK, lengths[path] - at)
            window = whole_window(path, at, nbytes)
            pending.append(engine.read([window], [], arena.view(index % 4 * BLOCK, BLOCK)))
            total += nbytes
        for transfer in pending:
            transfer.wait()
        return total, time.perf_counter() - start
    finally:
        engine.close()
        arena.close()


def link_rate(device: Device, cache: LinkCache, *, back: bool = False) -> float | None:
    """Bytes per second of host → device copies (`back`: device → host); None where there is no link."""
    if not device.separate:
        return None
    calibration = cache.calibration(device)
    if calibration is not None and calibration.hardware.link is not None:
        link = calibration.hardware.link
        return (link.d2h if back else link.h2d).best
    key = f"{'d2h' if back else 'h2d'}:{device.name}"
    kept = None if device.name == "emulated" else cache.get(key)
    if kept is not None:
        return kept
    host, target = device.host_arena(LINK_NBYTES), device.device_arena(LINK_NBYTES)
    try:
        host.poison(host.cut(LINK_NBYTES))  # touch the pages
        best = 0.0
        for _ in range(3):
            time.sleep(0.01)  # a throttled link may make up for lateness; it must have nothing to make up for
            start = time.perf_counter()
            if back:
                device.copy_back(target, 0, host, 0, LINK_NBYTES)
                device.wait(device.copied_back())
            else:
                device.copy(host, 0, target, 0, LINK_NBYTES)
                device.wait(device.copied())
            best = max(best, LINK_NBYTES / (time.perf_counter() - start))
            if best < LINK_NBYTES / 0.5:
                break  # slow enough to be exact
    finally:
        host.close()
        target.close()
    if device.name != "emulated":
        cache.put(key, best)
    return best
