"""Rules that others go by: a placement that is chosen is never worse than theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from .problem import MODES, Counts, Mode, Problem, Rings


def all_streamed(problem: Problem, rings: Rings) -> Counts:
    """Nothing stays anywhere (ZeRO-Inference)."""
    return _filled(problem, rings, ("disk", "host", "device"), room=False)


def prefix(problem: Problem, rings: Rings) -> Counts:
    """The device is filled first, then the host, in the order of the blocks (accelerate)."""
    return _filled(problem, rings, ("device", "host", "disk"), room=True)


def greedy(problem: Problem, rings: Rings) -> Counts:
    """What costs most per byte when it is streamed gets the best place there is."""
    order = sorted(
        range(len(problem.classes)),
        key=lambda i: -sum(u.times for u in problem.classes[i].uses) * problem.classes[i].read_nbytes
        / max(problem.classes[i].host_nbytes, 1),
    )  # fmt: skip
    return _filled(problem, rings, ("device", "cpu", "host", "disk"), room=True, order=order)


Heuristic = Callable[[Problem, Rings], Counts]
HEURISTICS: Final[Mapping[str, Heuristic]] = {"all streamed": all_streamed, "prefix": prefix, "greedy": greedy}


def _filled(
    problem: Problem, rings: Rings, wanted: Sequence[Mode], *, room: bool, order: Sequence[int] | None = None
) -> Counts:
    device = problem.device_nbytes - rings.front_nbytes
    host = problem.host_nbytes - rings.back_nbytes
    allowed = problem.allowed(rings)
    counts = [[0] * len(MODES) for _ in problem.classes]
    for number in order or range(len(problem.classes)):
        each = problem.classes[number]
        left = len(each.blocks)
        for mode in wanted:
            place = MODES.index(mode)
            if not allowed[number][place]:
                continue
            most = left
            if mode == "device":
                most = min(left, max(device, 0) // max(each.front_nbytes, 1))
                device -= most * each.front_nbytes
            elif mode in ("host", "cpu"):
                most = min(left, max(host, 0) // max(each.host_nbytes, 1))
                host -= most * each.host_nbytes
            counts[number][place] += most
            left -= most
        if left:  # does not fit, which `fits` will say
            counts[number][MODES.index(wanted[-1])] += left
    return tuple(tuple(row) for row in counts)
