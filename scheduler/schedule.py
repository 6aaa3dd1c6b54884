"""Tasks that wait for each other and share resources, and when each of them runs: a small discrete-event engine."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from ..memory.errors import UsageError

Rate = float | Callable[[Set[str]], float]
"""Bytes per second, or what says so of the lanes on which something runs."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work.

    A lane is serial and in order, as a CUDA stream or a thread with a queue is: a task starts when all before it on
    its lane, and all of `after`, have ended. Tasks without a lane wait for `after` alone.
    """

    name: str
    lane: str = ""
    seconds: float = 0.0
    """What it takes when nothing slows it."""
    after: tuple[int, ...] = ()
    """Places of earlier tasks in the list."""
    shared: str = ""
    """A resource, such as memory bandwidth, that tasks of several lanes draw on at once."""
    nbytes: float = 0.0
    """What it draws of `shared`, evenly over its time; it is slowed where there is not enough."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When each task ran. Times are in seconds."""

    start: tuple[float, ...]
    end: tuple[float, ...]
    busy: dict[str, float]
    """By lane: the seconds for which something ran on it."""

    @property
    def makespan(self) -> float:
        """When the last task ended."""
        return max(self.end, default=0.0)


class TaskGraph:
    """Tasks in the order in which a program issues them.

    Args:
        shared: Resources that several lanes draw on, with their rates in bytes per second.
    """

    def __init__(self, shared: Mapping[str, Rate] | None = None) -> None:
        self._shared = dict(shared or {})
        self._tasks: list[Task] = []

    def add(
        self,
        name: str,
        lane: str = "",
        seconds: float = 0.0,
        *,
        after: Iterable[int] = (),
        shared: str = "",
        nbytes: float = 0.0,
    ) -> int:
        """Issue a task; returns its place.

        Raises:
            UsageError: a time or size is negative or not finite, or it waits for a task that was not issued yet.
        """
        task = Task(name=name, lane=lane, seconds=seconds, after=tuple(after), shared=shared, nbytes=nbytes)
        for value in (seconds, nbytes):
            if not math.isfinite(value) or value < 0:
                raise UsageError(f"task {name!r} takes {value}: seconds and bytes must be 0 or more")
        if any(not 0 <= each < len(self._tasks) for each in task.after):
            raise UsageError(f"task {name!r} waits for {task.after}: only tasks issued before it can be waited for")
        if shared and shared not in self._shared:
            raise UsageError(
                f"task {name!r} draws on {shared!r}, which has no rate: {', '.join(self._shared) or 'none'}"
            )
        self._tasks.append(task)
        return len(self._tasks) - 1

    @property
    def count(self) -> int:
        """How many tasks were issued."""
        return len(self._tasks)

    def barrier(self, after: Iterable[int] | None = None) -> int:
        """A point that follows `after`; without it, everything issued so far."""
        return self.add("barrier", after=range(len(self._tasks)) if after is None else after)

    def simulate(self) -> Schedule:
        """Let the tasks run."""
        return simulate(self._tasks, self._shared)


class Slots:
    """A bounded queue between a producer and a consumer: what is to be produced waits for a slot.

    Args:
        depth: How many items are held at once, those being produced and being used among them.
    """

    def __init__(self, depth: int) -> None:
        if depth < 1:
            raise UsageError(f"a queue of depth {depth} holds nothing: give 1 or more")
        self._depth = depth
        self._users: deque[int] = deque()
        self._taken = 0

    def take(self) -> tuple[int, ...]:
        """What the production of the next item has to wait for.

        Raises:
            UsageError: the item that held the slot has no user yet, so that it would never be free.
        """
        self._taken += 1
        if self._taken <= self._depth:
            return ()
        if not self._users:
            raise UsageError(f"all {self._depth} slots are taken and none has a user that frees it")
        return (self._users.popleft(),)

    def use(self, task: int) -> None:
        """The oldest item that has no user is used by `task`, and its slot free when that ends."""
        self._users.append(task)


def simulate(tasks: Sequence[Task], shared: Mapping[str, Rate]) -> Schedule:
    """When each task runs, exactly.

    Where tasks that run at once draw on a shared resource, each gets an equal part of its rate, but none more than it
    can use; what one leaves is the others' (max-min fairness).
    """
    waiting = [len(task.after) for task in tasks]
    followers: list[list[int]] = [[] for _ in tasks]
    lanes: dict[str, deque[int]] = {}
    for place, task in enumerate(tasks):
        for each in task.after:
            followers[each].append(place)
        if task.lane:
            lanes.setdefault(task.lane, deque()).append(place)
    start, end = [0.0] * len(tasks), [0.0] * len(tasks)
    left: dict[int, float] = {}  # of what runs: the fraction that is still to do
    now = 0.0
    ready = deque(place for place in range(len(tasks)) if _may_start(place, tasks, waiting, lanes))
    while ready or left:
        while ready:  # what takes no time ends at once, and may let others start
            place = ready.popleft()
            start[place] = now
            if tasks[place].seconds > 0 or tasks[place].nbytes > 0:
                left[place] = 1.0
            else:
                end[place] = now
                ready.extend(_finish(place, tasks, waiting, followers, lanes))
        if not left:
            break
        speed = _speeds(left, tasks, shared)
        step = min(left[place] / speed[place] for place in left)
        now += step
        for place in [place for place in left if left[place] / speed[place] <= step * (1 + 1e-12)]:
            del left[place]
            end[place] = now
            ready.extend(_finish(place, tasks, waiting, followers, lanes))
        for place in left:
            if place in speed:
                left[place] -= step * speed[place]
    busy: dict[str, float] = {}
    for place, task in enumerate(tasks):
        if task.lane:
            busy[task.lane] = busy.get(task.lane, 0.0) + end[place] - start[place]
    return Schedule(start=tuple(start), end=tuple(end), busy=busy)


def _may_start(place: int, tasks: Sequence[Task], waiting: Sequence[int], lanes: Mapping[str, deque[int]]) -> bool:
    lane = tasks[place].lane
    return not waiting[place] and (not lane or lanes[lane][0] == place)


def _finish(
    place: int,
    tasks: Sequence[Task],
    waiting: list[int],
    followers: Sequence[Sequence[int]],
    lanes: Mapping[str, deque[int]],
) -> list[int]:
    """What may start once a task has ended."""
    candidates = []
    for each in followers[place]:
        waiting[each] -= 1
        candidates.append(each)
    if lane := tasks[place].lane:
        lanes[lane].popleft()
        if lanes[lane]:
            candidates.append(lanes[lane][0])
    return [each for each in dict.fromkeys(candidates) if _may_start(each, tasks, waiting, lanes)]


def _speeds(running: Collection[int], tasks: Sequence[Task], shared: Mapping[str, Rate]) -> dict[int, float]:
    """Of each running task, the fraction that it does per second."""
    lanes = {tasks[place].lane for place in running}
    speeds: dict[int, float] = {}
    users: dict[str, list[int]] = {}
    for place in running:
        task = tasks[place]
        if task.shared and task.nbytes > 0:
            users.setdefault(task.shared, []).append(place)
        else:
            speeds[place] = 1 / task.seconds if task.seconds > 0 else math.inf
    for name, places in users.items():
        rate = shared[name]
        room = rate(lanes) if callable(rate) else rate
        # Those that can use least first: what they leave of an equal part is the others'.
        wanted = sorted((_demand(tasks[place]), place) for place in places)
        for done, (demand, place) in enumerate(wanted):
            part = min(demand, room / (len(wanted) - done))
            room -= part
            speeds[place] = part / tasks[place].nbytes
    return speeds


def _demand(task: Task) -> float:
    return task.nbytes / task.seconds if task.seconds > 0 else math.inf
