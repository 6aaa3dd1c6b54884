"""The bubble of every step by cause: what the waterfall draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ..runtime.profiler.profile import Profile
from ..runtime.profiler.schema import Step
from ..runtime.profiler.summary import Idle
from .arrays import Arrays
from .clock import Clock, ranks

_MOST_BARS: Final = 400
CAUSES: Final = Idle.__struct_fields__


def bubbles(
    profile: Profile, clock: Clock, arrays: Arrays, idle_steps: Sequence[tuple[int, Idle]]
) -> dict[str, Any] | None:
    """Bars, each the mean of as many neighbouring steps as make few enough bars; None without steps."""
    if not idle_steps:
        return None
    group = -(-len(idle_steps) // _MOST_BARS)
    edges = np.arange(0, len(idle_steps), group)
    sizes = np.diff(np.append(edges, len(idle_steps)))
    values = np.array([[getattr(idle, cause) for cause in CAUSES] for _, idle in idle_steps], dtype=np.float64)
    means = np.add.reduceat(values, edges, axis=0) / sizes[:, None]
    numbers = np.array([number for number, _ in idle_steps], dtype=np.int64)
    start, end = _times(profile, clock, numbers)
    return {
        "group": int(group),
        "first": arrays.add(numbers[edges]),
        "last": arrays.add(numbers[edges + sizes - 1]),
        "start": arrays.add(start[edges]),
        "end": arrays.add(end[edges + sizes - 1]),
        "steps": len(idle_steps),
        "longest": arrays.add(np.maximum.reduceat(values.sum(axis=1), edges)),
        "causes": [[cause, arrays.add(means[:, i])] for i, cause in enumerate(CAUSES)],
    }


def _times(profile: Profile, clock: Clock, numbers: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Any, Any]:
    steps = profile[Step]
    known, first = np.unique(steps.id, return_index=True)
    place = ranks(known, numbers)
    if not len(known):
        return place, place
    start, end = clock.spans(steps.start[first], steps.end[first])
    return np.where(place >= 0, start[place], -1), np.where(place >= 0, end[place], -1)
