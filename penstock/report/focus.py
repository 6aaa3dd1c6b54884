"""Stretches of a long run that stay exact: a typical step and the slowest one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..runtime.profiler.profile import Profile
from ..runtime.profiler.schema import Step
from ..runtime.profiler.summary import Summary
from .clock import Clock


@dataclass(frozen=True, kw_only=True)
class Focus:
    """One stretch of time worth a look."""

    label: str
    low: int
    """In ticks."""
    high: int


def focuses(profile: Profile, summary: Summary, clock: Clock) -> tuple[Focus, ...]:
    """A step of median length with its neighbours, and the slowest step: of the steady window, where there are any."""
    steps = profile[Step]
    steps = steps.where(steps.end >= steps.start)  # the last one of a run that was cut off has no end
    if len(steps) < 3:
        return ()
    low, high = summary.window_ns
    steady = np.flatnonzero((steps.start >= low) & (steps.end <= high))
    chosen = steady if len(steady) >= 3 else np.arange(len(steps))
    chosen = chosen[np.argsort(steps.start[chosen], kind="stable")]
    start, end = clock.spans(steps.start[chosen], steps.end[chosen])
    length = end - start
    middle = int(np.argsort(length, kind="stable")[len(length) // 2])
    first, last = max(0, middle - 1), min(len(length) - 1, middle + 1)
    slowest = int(np.argmax(length))
    return (
        Focus(label="Typical steps", low=int(start[first]), high=int(end[last])),
        Focus(label="Slowest step", low=int(start[slowest]), high=int(end[slowest])),
    )
