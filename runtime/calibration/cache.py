"""Calibrations kept in the user's cache: one file per machine and device, replaced as a whole."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...memory.capacity import host_capacity
from ...memory.errors import CalibrationError, DiskError
from ...scheduler.calibration import Calibration, decode_calibration, encode_calibration, stale
from ..devices.base import Device
from ..devices.emulated import EmulatedDevice
from .fingerprint import cpu_model, fingerprint

logger = logging.getLogger(__name__)

_LARGEST: Final = 4 * 2**20
"""No calibration comes near it: a larger file is something else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What the cache has for one device."""

    path: Path
    """Where it is, or would be."""
    calibration: Calibration | None
    reasons: tuple[str, ...]
    """Why it cannot be trusted; empty where it can, or where there is none."""

    @property
    def trusted(self) -> Calibration | None:
        """The calibration, where it still holds."""
        return None if self.reasons else self.calibration


class CalibrationCache:
    """Calibrations in one folder.

    Args:
        folder: Made on the first write. It may be shared by several machines.
        wall_clock: Seconds since 1970.
    """

    def __init__(self, folder: Path, *, wall_clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._wall_clock = wall_clock

    def path(self, device: Device) -> Path:
        """The file for this machine and a device."""
        # CPU and memory tell machines with a common home folder apart; what else changes makes a calibration stale.
        machine = f"{cpu_model()} {host_capacity().total_nbytes // 2**30}"
        key = hashlib.blake2b(machine.encode(), digest_size=4).hexdigest()
        return self._folder / f"{key}-{re.sub(r'[^a-z0-9]+', '-', device_key(device))}.json"

    def read(self, device: Device) -> Kept:
        """What is kept for a device, and why it is stale where it is. Never fails: damage is a reason."""
        path = self.path(device)
        try:
            if path.stat().st_size > _LARGEST:
                raise CalibrationError(f"{path} is no calibration: it has {path.stat().st_size} bytes; remove it")
            calibration = decode_calibration(path.read_bytes(), source=str(path))
        except FileNotFoundError:
            return Kept(path=path, calibration=None, reasons=())
        except OSError as error:
            return Kept(path=path, calibration=None, reasons=(f"{path} cannot be read: {error.strerror}",))
        except CalibrationError as error:
            return Kept(path=path, calibration=None, reasons=(str(error),))
        if calibration.device != device_key(device):
            return Kept(path=path, calibration=None, reasons=(f"{path} is of {calibration.device}",))
        now = fingerprint(device.torch_device, [drive.folder for drive in calibration.fingerprint.drives])
        reasons = tuple(stale(calibration, now, now_unix_s=self._wall_clock()))
        return Kept(path=path, calibration=calibration, reasons=reasons)

    def write(self, calibration: Calibration, device: Device) -> Path:
        """Keep a calibration in the place of the one before, as a whole or not at all.

        Raises:
            DiskError: the folder cannot be made, or the file not be written.
        """
        path = self.path(device)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                with open(temporary, "xb") as file:
                    file.write(encode_calibration(calibration))
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise DiskError(
                f"the calibration cannot be kept in {path}: {error.strerror}; set XDG_CACHE_HOME"
            ) from error
        return path


def device_key(device: Device) -> str:
    """What tells devices apart: "cpu", "cuda:1", "emulated:h2d=1073741824" with its rates in bytes per second."""
    if not isinstance(device, EmulatedDevice):
        return device.name
    rates = device.rates
    named = (("h2d", rates.h2d), ("d2h", rates.d2h), ("disk", rates.disk))
    return "emulated:" + ",".join(f"{name}={rate:.0f}" for name, rate in named if rate is not None)
