"""The machine that a user means: this one, a known one, or one from a file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..caches import calibration_cache
from ..devices import open_device
from ..hardware import load, names
from ..memory.capacity import disk_capacity
from ..runtime.calibration.calibrate import calibrate
from ..runtime.calibration.fingerprint import identify_drive
from ..scheduler.calibration import Calibration
from ..scheduler.hardware import Hardware
from .output import Output


def find_machine(spec: str | None, *, device: str, disk: Path | None, output: Output) -> Hardware:
    """The machine that `spec` names; None is this one, which is measured for some seconds if it has not been yet, or
    not with the drive of `disk`.

    Raises:
        UsageError: it is not known, or has not got such a device.
        CalibrationError: nothing of this one can be measured.
    """
    if spec is not None:
        return load(spec)
    cache, opened = calibration_cache(), open_device(device)
    try:
        kept = cache.read(opened)
        if kept.trusted is not None and _has_drive(kept.trusted, disk):
            return kept.trusted.hardware
        for reason in kept.reasons:
            output.notes.print(f"stale: {reason}", style="yellow", markup=False)
        output.notes.print("measuring this machine for 5 seconds; `penstock calibrate` does it better, once")
        found = calibrate(opened, folders=[] if disk is None else [disk_capacity(disk).folder], quick=True)
        if kept.trusted is None:  # else it is that of the drives that are used otherwise
            cache.write(found, opened)
        return found.hardware
    finally:
        opened.close()


def kept_machine(device: str, *, disk: Path) -> Hardware | None:
    """This machine with no drive but that of `disk`, if it has been measured with it, and that still holds.

    Raises:
        UsageError: it has not got such a device.
    """
    opened = open_device(device)
    try:
        kept = calibration_cache().read(opened).trusted
        return None if kept is None or not _has_drive(kept, disk) else with_drive_of(kept, disk)
    finally:
        opened.close()


def with_drive_of(kept: Calibration, folder: Path) -> Hardware:
    """What was measured, with no drive but that of a folder: a run lies on one. With all where it is not known."""
    drive = identify_drive(disk_capacity(folder).folder)
    if drive is None:
        return kept.hardware
    pairs = zip(kept.fingerprint.drives, kept.hardware.drives, strict=True)
    drives = tuple(measured for identity, measured in pairs if identity.device == drive.device)
    return msgspec.structs.replace(kept.hardware, drives=drives, drives_together=1.0)


def _has_drive(kept: Calibration, folder: Path | None) -> bool:
    """Whether the drive of a folder is one of those that were measured; there is nothing to ask for None."""
    drive = None if folder is None else identify_drive(disk_capacity(folder).folder)
    return drive is None or drive.device in {each.device for each in kept.fingerprint.drives}


def known_machines() -> list[Hardware]:
    """Those that come with penstock."""
    return [load(name) for name in names()]
