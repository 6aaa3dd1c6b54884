"""Whether this machine has a calibration that holds: what `penstock doctor` tells of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationState:
    """The calibration that is kept for a device."""

    device: str
    path: str
    """Where it is, or would be."""
    taken: str | None
    """When; None where there is none that can be read."""
    stale: tuple[str, ...]
    """Why it is not used."""

    @property
    def summary(self) -> str:
        """In a line for people."""
        if self.stale:
            return f"stale for {self.device}: {'; '.join(self.stale)}. Run `penstock calibrate`"
        if self.taken is None:
            return f"none for {self.device}: links are measured for a moment instead. Run `penstock calibrate`"
        return f"of {self.taken} for {self.device}, in {self.path}"


def kept_calibration(device: str = "auto") -> CalibrationState:
    """The calibration for a device. Opens the device; needs torch.

    Raises:
        UsageError: there is no such device.
    """
    from ..caches import calibration_cache
    from ..devices import open_device

    opened = open_device(device)
    try:
        kept = calibration_cache().read(opened)
    finally:
        opened.close()
    return CalibrationState(
        device=opened.name,
        path=str(kept.path),
        taken=kept.calibration.date if kept.calibration else None,
        stale=kept.reasons,
    )
