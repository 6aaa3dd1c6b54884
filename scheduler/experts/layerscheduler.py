"""Who computes which expert of a layer: HybriMoE's way and other simple ones, then every small change that helps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Final

from .costs import ExpertCosts
from .greedy import greedy_assignment
from .layerbound import least_s
from .timelines import Assignment, ExpertTask, LayerTimeline, needs_read, run_layer

REMEMBERED: Final = 4096
"""Layers whose schedule is kept. A layer is what its experts' rows and places are: while decoding few differ."""
TRIES: Final = 600
"""Simulations per layer, at most: some milliseconds, for layers that are not remembered."""
DESCENTS: Final = 2
"""Starts, of the best ones, from which better schedules are looked for."""
FEW_KINDS: Final = 12
"""Kinds of tasks up to which one is exchanged for two: the number of such changes grows with the third power."""
_GAIN: Final = 1e-9
"""Relative; less is rounding."""

_Found = tuple[Assignment, LayerTimeline]
_Kind = tuple[int, bool, bool]
"""Rows, on the device, on the host: tasks that have all three in common are alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """What is to be done for one layer."""

    tasks: tuple[ExpertTask, ...]
    assignment: Assignment
    timeline: LayerTimeline

    @property
    def seconds(self) -> float:
        """That it is expected to take."""
        return self.timeline.seconds

    @property
    def computed_by_cpu(self) -> tuple[int, ...]:
        """Experts that the CPU computes."""
        return tuple(t.expert for t, cpu in zip(self.tasks, self.assignment.on_cpu, strict=True) if cpu)

    @property
    def copied(self) -> tuple[int, ...]:
        """Experts that cross the link, each once, in the order in which they do."""
        return self._moved("link")

    @property
    def read(self) -> tuple[int, ...]:
        """Experts that are read from disk, each once, in the order in which they are."""
        return self._moved("disk")

    def _moved(self, resource: str) -> tuple[int, ...]:
        spans = sorted((s.start_s, s.task) for s in self.timeline.spans if s.resource == resource)
        return tuple(self.tasks[task].expert for _, task in spans)


class LayerScheduler:
    """Plans layers of one machine and one kind of expert. Keeps what it found."""

    def __init__(self, costs: ExpertCosts, *, tries: int = TRIES) -> None:
        self.costs = costs
        self._tries = tries
        self._known: OrderedDict[tuple[_Kind, ...], _Found] = OrderedDict()

    def plan(self, tasks: Sequence[ExpertTask]) -> LayerPlan:
        """Who computes what, and what that takes. Each expert crosses each link at most once.

        Args:
            tasks: All experts that the layer needs, each once, with the rows of all tokens that pass the layer
            together.
        """
        # Alike layers look alike: the same kinds in the same order.
        ordered = tuple(sorted(tasks, key=lambda t: (-t.rows, t.on_device, t.on_host, t.expert)))
        key = tuple(_kind(task) for task in ordered)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._search(ordered)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        return LayerPlan(tasks=ordered, assignment=known[0], timeline=known[1])

    def _search(self, tasks: Sequence[ExpertTask]) -> _Found:
        """Descend from the best of some starts, by moving and by exchanging tasks."""
        if not self.costs.separate:
            return self._run(tasks, (True,) * len(tasks))
        found = [self._run(tasks, start) for start in _starts(tasks, self.costs)]
        found.sort(key=lambda each: each[1].seconds)
        left = self._tries
        descended: list[_Found] = []
        for here in found[:DESCENTS]:
            here, left = self._descend(tasks, here, left)
            descended += self._reordered(tasks, here)
        return min(descended, key=lambda each: each[1].seconds)

    def _descend(self, tasks: Sequence[ExpertTask], here: _Found, left: int) -> tuple[_Found, int]:
        """Take each change that helps, until none does; and how many tries are left then."""
        better = True
        while better:
            better = False
            for changed in _changes(tasks, here[0].on_cpu):
                # What cannot be better by its busiest resource need not be run.
                if least_s(tasks, self.costs, changed) >= here[1].seconds * (1 - _GAIN):
                    continue
                if left <= 0:
                    return here, 0
                left -= 1
                tried = self._run(tasks, changed)
                if tried[1].seconds < here[1].seconds * (1 - _GAIN):
                    here, better = tried, True
                    break
        return here, left

    def _reordered(self, tasks: Sequence[ExpertTask], here: _Found) -> Iterator[_Found]:
        """What was found, and the same with all reads for one processor before those for the other."""
        yield here
        assignment = here[0]
        for cpu_first in (True, False):
            reads = tuple(sorted(assignment.reads, key=lambda number: assignment.on_cpu[number] is not cpu_first))
            if reads != assignment.reads:
                reordered = Assignment(on_cpu=assignment.on_cpu, reads=reads)
                yield reordered, run_layer(tasks, self.costs, reordered)

    def _run(self, tasks: Sequence[ExpertTask], on_cpu: tuple[bool, ...]) -> _Found:
        assignment = Assignment(on_cpu=on_cpu, reads=read_order(tasks, self.costs, on_cpu))
        return assignment, run_layer(tasks, self.costs, assignment)


def read_order(tasks: Sequence[ExpertTask], costs: ExpertCosts, on_cpu: Sequence[bool]) -> tuple[int, ...]:
    """What is to be read, what has most to be done after it first."""

    def after(number: int) -> float:
        rows = tasks[number].rows
        if on_cpu[number] or costs.device_s is None:
            return costs.cpu_s(rows)
        return costs.copy_s + costs.device_s(rows)

    read = (number for number, task in enumerate(tasks) if needs_read(task, on_cpu[number]))
    return tuple(sorted(read, key=lambda number: -after(number)))


def _kind(task: ExpertTask) -> _Kind:
    return task.rows, task.on_device, task.on_host


def _starts(tasks: Sequence[ExpertTask], costs: ExpertCosts) -> list[tuple[bool, ...]]:
    """HybriMoE's schedule, and the CPU with all experts of up to so many rows, for every number of rows that occurs:
    those that are on the device included where the host has them too."""
    starts = [greedy_assignment(tasks, costs)]
    for rows in (0, *sorted({task.rows for task in tasks})):
        starts.append(tuple(task.rows <= rows and (task.on_host or not task.on_device) for task in tasks))
    return list(dict.fromkeys(starts))


def _changes(tasks: Sequence[ExpertTask], on_cpu: Sequence[bool]) -> Iterator[tuple[bool, ...]]:
    """One task to the other processor; then two exchanged; then, of few kinds, one for two. Of tasks that are alike one
    stands for all."""
    by_cpu: dict[_Kind, int] = {}
    by_device: dict[_Kind, int] = {}
    for number, task in enumerate(tasks):
        (by_cpu if on_cpu[number] else by_device)[_kind(task)] = number
    sides = (list(by_cpu.values()), list(by_device.values()))
    for number in (*sides[0], *sides[1]):
        yield _flipped(on_cpu, number)
    for one, other in product(*sides):
        yield _flipped(on_cpu, one, other)
    if len(by_cpu) + len(by_device) <= FEW_KINDS:
        for ones, others in (sides, sides[::-1]):
            for one, two in product(ones, combinations(others, 2)):
                yield _flipped(on_cpu, one, *two)


def _flipped(on_cpu: Sequence[bool], *numbers: int) -> tuple[bool, ...]:
    changed = list(on_cpu)
    for number in numbers:
        changed[number] = not changed[number]
    return tuple(changed)
