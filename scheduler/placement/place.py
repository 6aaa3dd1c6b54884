"""The best placement there is: what the program finds, and what fixed rules would do, each where it costs least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from .arrangement import by_layers, counts_of, spread, together
from .problem import Counts, Mode, Problem, Rings
from .program import solve
from .rules import HEURISTICS


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A solution."""

    modes: Mapping[int, Mode]
    """By block."""
    rings: Rings
    seconds: float
    """Of all phases, weighted."""
    busy_s: tuple[Mapping[str, float], ...] = field(default=())
    """By phase and resource."""


Modes = Mapping[int, Mode]
"""By block."""


def place(problem: Problem, choices: Iterable[Rings]) -> Placement | None:
    """The best placement over all choices of rings; None where none fits."""
    best: tuple[float, Counts, Modes, Rings] | None = None
    for counts, rings, arrange in _candidates(problem, tuple(choices)):
        if not problem.fits(counts, rings) or (best and problem.seconds(counts) >= best[0] * (1 - 1e-9)):
            continue  # without what changing processors costs, which is a walk over all blocks
        for modes in arrange():
            seconds = problem.seconds(counts, modes)
            if best is None or seconds < best[0] * (1 - 1e-9):
                best = seconds, counts, modes, rings
    if best is None:
        return None
    seconds, counts, modes, rings = best
    return Placement(
        modes=modes,
        rings=rings,
        seconds=seconds,
        busy_s=tuple(problem.by_resource(counts, phase) for phase in range(len(problem.weights))),
    )


def _candidates(
    problem: Problem, choices: Sequence[Rings]
) -> Iterator[tuple[Counts, Rings, Callable[[], Iterable[Modes]]]]:
    """Counts, and where they may be: spread evenly, which keeps links and processors busy at the same time; and where
    changing processors costs something, also so that it happens seldom."""
    changes = problem.hand_over_s > 0 and any(use.on_cpu for each in problem.classes for use in each.uses)
    if changes and choices:
        least = min(choices, key=lambda rings: rings.front_nbytes + rings.back_nbytes)
        for on_device in (False, True):
            modes = by_layers(problem, least, on_device=on_device)
            yield counts_of(problem.classes, modes), least, partial(_only, modes)
    for rings in choices:
        found = [solve(problem, rings, hand_over_s=problem.hand_over_s if changes else 0.0)]
        if changes:
            found.append(solve(problem, rings))
        found += [heuristic(problem, rings) for heuristic in HEURISTICS.values()]
        for counts in found:
            if counts is not None:
                yield counts, rings, partial(_arranged, problem, counts, changes)


def _only(modes: Modes) -> list[Modes]:
    return [modes]


def _arranged(problem: Problem, counts: Counts, changes: bool) -> Iterator[Modes]:
    yield spread(problem.classes, counts)
    if changes:
        yield together(problem.classes, counts)
