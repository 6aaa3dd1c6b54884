"""The best schedule of a layer, by trying: for tests, and to say how far from it the scheduler is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Final

from ...memory.errors import UsageError
from .costs import ExpertCosts
from .layerbound import least_s
from .timelines import Assignment, ExpertTask, LayerTimeline, needs_read, run_layer

MOST: Final = 12
"""Experts of a layer."""


def best_layer(tasks: Sequence[ExpertTask], costs: ExpertCosts) -> tuple[Assignment, LayerTimeline]:
    """The assignment with the least makespan, of all assignments and of all orders of reading that can matter.

    Tasks that are alike are interchangeable. Of those that are read for one processor, the one that takes longest there
    is read first: all reads take the same, and so do all copies, so changing two that are otherwise ordered gains
    nothing (Johnson's rule). How the two processors' reads interleave is tried out. Where memory is shared, reads and
    copies go on at a speed that depends on when the CPU computes, and the rule for the order within one processor's
    reads is a rule of thumb; the tests compare it with every order there is.

    Raises:
        UsageError: there are more than MOST tasks.
    """
    if len(tasks) > MOST:
        raise UsageError(f"{len(tasks)} experts: trying everything takes too long for more than {MOST}")
    best: tuple[Assignment, LayerTimeline] | None = None
    for on_cpu in _assignments(tasks, costs):
        if best is not None and least_s(tasks, costs, on_cpu) >= best[1].seconds:
            continue
        for reads in _read_orders(tasks, costs, on_cpu):
            assignment = Assignment(on_cpu=on_cpu, reads=reads)
            timeline = run_layer(tasks, costs, assignment)
            if best is None or timeline.seconds < best[1].seconds:
                best = assignment, timeline
    assert best is not None, "there is an assignment of any tasks"
    return best


def _assignments(tasks: Sequence[ExpertTask], costs: ExpertCosts) -> Iterator[tuple[bool, ...]]:
    """All that differ: of tasks that are alike, only how many the CPU gets counts."""
    if not costs.separate:
        yield (True,) * len(tasks)
        return
    alike: dict[tuple[int, bool, bool], list[int]] = {}
    for number, task in enumerate(tasks):
        alike.setdefault((task.rows, task.on_device, task.on_host), []).append(number)
    groups = list(alike.values())
    for counts in product(*(range(len(group) + 1) for group in groups)):
        on_cpu = [False] * len(tasks)
        for group, count in zip(groups, counts, strict=True):
            for number in group[:count]:
                on_cpu[number] = True
        yield tuple(on_cpu)


def _read_orders(tasks: Sequence[ExpertTask], costs: ExpertCosts, on_cpu: Sequence[bool]) -> Iterator[tuple[int, ...]]:
    """All ways to interleave the reads for the CPU with those for the device."""
    read = [number for number, task in enumerate(tasks) if needs_read(task, on_cpu[number])]
    cpu = sorted((n for n in read if on_cpu[n]), key=lambda n: -costs.cpu_s(tasks[n].rows))
    device = [n for n in read if not on_cpu[n]]
    if device:
        assert costs.device_s is not None, "without a device the CPU computes everything"
        device_s = costs.device_s
        device.sort(key=lambda n: -device_s(tasks[n].rows))
    for places in combinations(range(len(read)), len(cpu)):
        taken, cpu_next, device_next = set(places), iter(cpu), iter(device)
        yield tuple(next(cpu_next) if place in taken else next(device_next) for place in range(len(read)))
