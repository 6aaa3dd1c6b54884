"""Joules, from meters that only ever count up."""

from __future__ import annotations

import numpy as np

from .profile import Profile
from .schema import Gauge, Meter
from .summary import Energy
from .window import Window


def energy(profile: Profile, window: Window, tokens: int) -> Energy:
    """What processor and device took inside the window, and what that makes per token."""
    cpu_j = _joules(profile, window, Meter.ENERGY_CPU)
    device_j = _joules(profile, window, Meter.ENERGY_DEVICE)
    known = [value for value in (cpu_j, device_j) if value is not None]
    return Energy(
        cpu_j=cpu_j,
        device_j=device_j,
        per_token_j=sum(known) / tokens if known and tokens > 0 else None,
    )


def _joules(profile: Profile, window: Window, meter: Meter) -> float | None:
    """The difference of a meter over the window, straight between its readings; None without two of them."""
    gauges = profile[Gauge]
    gauges = gauges.where(gauges.meter == meter)
    gauges = gauges.where(np.argsort(gauges.at, kind="stable"))
    if len(gauges) < 2 or gauges.at[-1] <= window.start or gauges.at[0] >= window.end:
        return None
    # A meter that starts again (it wrapped, or the driver was reloaded) loses one interval, not the run.
    counted = np.concatenate(([0], np.cumsum(np.maximum(np.diff(gauges.value), 0))))
    # From the window's start: as floats, whole nanoseconds of the clock are exact only for some months after a boot.
    first, last = np.interp([0.0, float(window.length)], gauges.at - window.start, counted)
    return float(last - first) / 1e6
