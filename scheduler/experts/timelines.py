"""One layer on four timelines: CPU, device, link and disk, of which three share the host's memory.

    disk ──► CPU
    disk ──► link ──► device           each does one thing at a time; what comes first in a chain is done as a whole
    host memory ──► CPU
    host memory ──► link ──► device
    device memory ──► device

HybriMoE's simulation (arXiv 2504.05897) has three of them. The disk is the fourth, and while the CPU computes, a copy
or a read goes on at the part of its speed that was measured with both at once, and the CPU likewise: MoE-Lens saw
transfers of 5 s take 6 beside the CPU's attention. The device computes from memory of its own and slows nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final, Literal

from .costs import ExpertCosts

Resource = Literal["cpu", "device", "link", "disk"]
_ROUNDING: Final = 1e-9
"""Of the work of an activity: what is left below that is done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertTask:
    """An expert that a layer needs."""

    expert: int
    rows: int
    """Tokens that use it."""
    on_device: bool
    on_host: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """Who computes what. Tasks are named by their place in a sequence of them."""

    on_cpu: tuple[bool, ...]
    """By task: the CPU computes it, else the device."""
    reads: tuple[int, ...]
    """Tasks that are read from disk, in the order in which they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSpan:
    """One thing that one resource does."""

    resource: Resource
    task: int
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTimeline:
    """What would happen."""

    seconds: float
    """Until the last expert is computed."""
    spans: tuple[ExpertSpan, ...]

    def busy_s(self, resource: Resource) -> float:
        """How long one of the four is at work."""
        return sum(span.end_s - span.start_s for span in self.spans if span.resource == resource)

    def last_s(self, resource: Resource) -> float:
        """When one of the four has nothing more to do; 0 where it never had."""
        return max((span.end_s for span in self.spans if span.resource == resource), default=0.0)


def needs_read(task: ExpertTask, on_cpu: bool) -> bool:
    """Whether a task has to come from disk for who computes it."""
    return not task.on_host and (on_cpu or not task.on_device)


def run_layer(tasks: Sequence[ExpertTask], costs: ExpertCosts, assignment: Assignment) -> LayerTimeline:
    """Let a layer run, on a made-up clock. Nobody waits for something better while there is something to do.

    Reads go in the order of the assignment. The link takes, of what is in host memory, what keeps the device busy
    longest (Johnson's rule: all copies take the same). CPU and device come last in every chain, so their order changes
    nothing."""
    lanes = _Lanes(tasks, costs, assignment)
    while lanes.step():
        pass
    return lanes.timeline()


class _Lanes:
    """The four timelines while they run."""

    def __init__(self, tasks: Sequence[ExpertTask], costs: ExpertCosts, assignment: Assignment) -> None:
        self._tasks = tasks
        self._costs = costs
        self._on_cpu = assignment.on_cpu
        self._reads = list(reversed(assignment.reads))
        self._cpu_waiting: list[int] = []
        self._link_waiting: list[tuple[float, int]] = []
        self._now = 0.0
        self._device_free = 0.0
        self._started = False
        """Whether the CPU has had its first expert."""
        self._active: dict[Resource, tuple[int, float, float, float]] = {}
        """Task, when it began, what is left of it, and all of it, in seconds at full speed."""
        self._spans: list[ExpertSpan] = []
        for number, task in enumerate(tasks):
            if needs_read(task, self._on_cpu[number]):
                continue
            if self._on_cpu[number]:
                self._cpu_waiting.append(number)
            elif task.on_device:
                self._compute_on_device(number)
            else:
                self._want_copy(number)
        self._cpu_waiting.reverse()

    def step(self) -> bool:
        """Go on to when the next activity ends; False where nothing is left."""
        self._begin()
        if not self._active:
            return False
        speeds = self._speeds()
        passed = min(left / speeds[resource] for resource, (_, _, left, _) in self._active.items())
        self._now += passed
        ended = []
        for resource, (task, began, left, whole) in self._active.items():
            left -= passed * speeds[resource]
            self._active[resource] = (task, began, left, whole)
            if left <= _ROUNDING * whole:
                ended.append(resource)
        for resource in ended:
            task, began, _, _ = self._active.pop(resource)
            self._spans.append(ExpertSpan(resource=resource, task=task, start_s=began, end_s=self._now))
            self._ended(resource, task)
        return True

    def timeline(self) -> LayerTimeline:
        """What happened."""
        computed = (span.end_s for span in self._spans if span.resource in ("cpu", "device"))
        return LayerTimeline(seconds=max(computed, default=0.0), spans=tuple(self._spans))

    def _begin(self) -> None:
        costs = self._costs
        if self._reads and "disk" not in self._active:
            self._start("disk", self._reads.pop(), costs.read_s)
        if self._link_waiting and "link" not in self._active:
            self._start("link", heappop(self._link_waiting)[1], costs.copy_s)
        if self._cpu_waiting and "cpu" not in self._active:
            number = self._cpu_waiting.pop()
            first = 0.0 if self._started else costs.cpu_start_s
            self._started = True
            self._start("cpu", number, first + costs.cpu_s(self._tasks[number].rows))

    def _start(self, resource: Resource, task: int, seconds: float) -> None:
        self._active[resource] = (task, self._now, seconds, seconds)

    def _speeds(self) -> dict[Resource, float]:
        sharing, active = self._costs.sharing, self._active
        cpu = 1.0
        if "cpu" in active:
            if "link" in active:
                cpu *= sharing.compute_while_copying
            if "disk" in active:
                cpu *= sharing.compute_while_reading
            return {"cpu": cpu, "link": sharing.copy_while_computing, "disk": sharing.read_while_computing}
        return {"cpu": 1.0, "link": 1.0, "disk": 1.0}

    def _ended(self, resource: Resource, task: int) -> None:
        if resource == "link":
            self._compute_on_device(task)
        elif resource == "disk" and self._on_cpu[task]:
            self._cpu_waiting.insert(0, task)
        elif resource == "disk":
            self._want_copy(task)

    def _want_copy(self, number: int) -> None:
        assert self._costs.device_s is not None, "without a device the CPU computes everything"
        heappush(self._link_waiting, (-self._costs.device_s(self._tasks[number].rows), number))

    def _compute_on_device(self, number: int) -> None:
        assert self._costs.device_s is not None, "without a device the CPU computes everything"
        start = max(self._now, self._device_free)
        self._device_free = start + self._costs.device_s(self._tasks[number].rows)
        self._spans.append(ExpertSpan(resource="device", task=number, start_s=start, end_s=self._device_free))
