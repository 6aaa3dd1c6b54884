"""The machine that a user means: this one, a known one, or one from a file."""

from __future__ import annotations

from pathlib import Path

from ..caches import calibration_cache
from ..devices import open_device
from ..hardware import load, names
from ..runtime.calibration.calibrate import calibrate
from ..scheduler.hardware import Hardware
from .output import Output


def find_machine(spec: str | None, *, device: str, disk: Path | None, output: Output) -> Hardware:
    """The machine that `spec` names; None is this one, which is measured for some seconds if it has not been yet.

    Raises:
        UsageError: it is not known, or has not got such a device.
        CalibrationError: nothing of this one can be measured.
    """
    if spec is not None:
        return load(spec)
    cache, opened = calibration_cache(), open_device(device)
    try:
        kept = cache.read(opened)
        if kept.trusted is not None:
            return kept.trusted.hardware
        for reason in kept.reasons:
            output.notes.print(f"stale: {reason}", style="yellow", markup=False)
        output.notes.print("measuring this machine for 5 seconds; `penstock calibrate` does it better, once")
        found = calibrate(opened, folders=[str(disk)] if disk is not None else [], quick=True)
        cache.write(found, opened)
        return found.hardware
    finally:
        opened.close()


def known_machines() -> list[Hardware]:
    """Those that come with penstock."""
    return [load(name) for name in names()]
