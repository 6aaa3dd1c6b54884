"""Repetitions: several points measured in turns, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ...memory.errors import PenstockError
from ...scheduler.curves import Curve

Clock = Callable[[], float]
"""Seconds since any moment."""

LEAST: Final = 3
"""Repetitions of each point, where time allows."""
MOST: Final = 9
"""More would not change a median."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """What repetitions came to, and how far they lay apart."""

    value: float
    spread: float
    """(highest - lowest) / value."""


Pick = Callable[[Sequence[float]], float]
"""What a figure makes of repetitions.

What processors do is the best of them (`max` of rates, `min` of seconds): threads that wait for each other lose whole
time slices to any other program, and that is not the processor's. Drives and links are told by their median: what
others take of them is likely to be taken again."""


def figure(samples: Sequence[float], pick: Pick = statistics.median) -> Figure:
    """What some positive samples come to, and their spread."""
    value = pick(samples)
    return Figure(value=value, spread=(max(samples) - min(samples)) / value)


def in_turns(
    points: Mapping[float, Callable[[], float]],
    *,
    seconds: float,
    clock: Clock,
    least: int = LEAST,
    most: int = MOST,
    pick: Pick = statistics.median,
) -> dict[float, Figure]:
    """Measure points in turns until the time is up.

    Args:
        points: By what a curve calls x: carries out one repetition and returns what it measured, above 0.
        seconds: When to stop. Each point gets `least` repetitions first, unless that would take twice as long.
        clock: For `seconds` only.
        least: Repetitions of each point.
        most: Repetitions after which to stop even before.
        pick: What a figure makes of them.

    Raises:
        PenstockError: a repetition measured nothing.
    """
    found: dict[float, list[float]] = {x: [] for x in points}
    start = clock()
    for turn in range(max(most, 1)):
        spent = clock() - start
        if (turn >= least and spent >= seconds) or (turn >= 1 and spent >= 2 * seconds):
            break
        # There and back: a machine that warms up or slows down does not favour the first points.
        for x in points if turn % 2 == 0 else reversed(list(points)):
            sample = points[x]()
            if not (math.isfinite(sample) and sample > 0):
                raise PenstockError(f"a measurement gave {sample}: the clock of this machine is too coarse for it")
            found[x].append(sample)
    return {x: figure(samples, pick) for x, samples in found.items()}


def curve(figures: Mapping[float, Figure]) -> Curve:
    """The curve through measured points."""
    ordered = sorted(figures.items())
    return Curve(
        x=tuple(float(x) for x, _ in ordered),
        y=tuple(each.value for _, each in ordered),
        spread=tuple(each.spread for _, each in ordered),
    )
