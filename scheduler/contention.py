"""Activities that go on at once and slow each other, on a simulated clock.

Each activity has so many seconds of work, which it does at full speed by itself. Where kinds of activities share memory
or cores, each goes on at the part of its speed that was measured with the other. What is left is brought forward
whenever one begins or ends.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from .hardware import Sharing

Kind = Literal["compute", "start", "launch", "serve", "read", "copy"]
"""compute: an operation at work on the CPU. start: Python between two of them. launch: Python that gives a device with
memory of its own something to do. serve: the executor's Python."""
PYTHON: Final[tuple[Kind, ...]] = ("start", "launch", "serve")
"""One thread of a process runs Python at a time."""


@dataclass(kw_only=True, eq=False)
class _Activity:
    kind: Kind
    left_s: float
    done: asyncio.Future[None]


class Contention:
    """The activities under way.

    Args:
        speed: How fast a kind goes on beside others.
        processors: Operations that compute at once at full speed; more of them share that. Of Python, one goes on at a
            time.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        speed: Callable[[Kind, frozenset[Kind]], float],
        *,
        processors: float = math.inf,
    ) -> None:
        self._loop = loop
        self._processors = processors
        self._speed = speed
        self._active: list[_Activity] = []
        self._paces: dict[Kind, float] = {}
        self._since = loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def pace(self, kind: Kind, factor: float) -> None:
        """Let all activities of a kind go on at this part of the speed that they would have, from now on."""
        if factor != self._paces.get(kind, 1.0):
            self._advance()
            self._paces[kind] = factor
            self._plan()

    async def work(self, kind: Kind, seconds: float) -> None:
        """Do so many seconds of work, however long that takes."""
        if seconds <= 0:
            return
        self._advance()
        activity = _Activity(kind=kind, left_s=seconds, done=self._loop.create_future())
        self._active.append(activity)
        self._plan()
        try:
            await activity.done
        finally:
            if activity in self._active:  # cancelled
                self._advance()
                self._active.remove(activity)
                self._plan()

    def _speeds(self) -> list[float]:
        counts = Counter(activity.kind for activity in self._active)
        kinds = frozenset(counts)
        python = 1 / max(sum(counts[kind] for kind in PYTHON), 1)
        share: dict[Kind, float] = dict.fromkeys(PYTHON, python)
        share["compute"] = min(1.0, self._processors / max(counts["compute"], 1))
        return [
            self._speed(each.kind, kinds) * self._paces.get(each.kind, 1.0) * share.get(each.kind, 1.0)
            for each in self._active
        ]

    def _advance(self) -> None:
        now = self._loop.time()
        for activity, speed in zip(self._active, self._speeds(), strict=True):
            activity.left_s -= (now - self._since) * speed
        self._since = now

    def _plan(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._active:
            pairs = zip(self._active, self._speeds(), strict=True)
            first = min(max(activity.left_s, 0.0) / speed for activity, speed in pairs)
            self._timer = self._loop.call_later(first, self._due)

    def _due(self) -> None:
        self._timer = None
        self._advance()
        rounding = max(1e-12, 4 * math.ulp(self._since))
        ended = [activity for activity in self._active if activity.left_s <= rounding]
        self._active = [activity for activity in self._active if activity not in ended]
        for activity in ended:
            if not activity.done.done():
                activity.done.set_result(None)
        self._plan()


def speeds_of(sharing: Sharing, *, crowded: bool = False) -> Callable[[Kind, frozenset[Kind]], float]:
    """How fast each kind goes on beside the others, as measured on a machine.

    Args:
        crowded: Whether what computes takes all cores. The executor then shares one of them with a thread that all
            others wait for at the end of each operation.
    """

    def speed(kind: Kind, active: Iterable[Kind]) -> float:
        result = 1.0
        if kind == "compute":
            result *= sharing.compute_while_reading if "read" in active else 1.0
            result *= sharing.compute_while_copying if "copy" in active else 1.0
            result *= 0.5 if crowded and "serve" in active else 1.0
        elif kind == "serve":
            result *= 0.5 if crowded and "compute" in active else 1.0
        elif kind == "start":
            result *= sharing.start_while_reading if "read" in active else 1.0
            result *= sharing.start_while_copying if "copy" in active else 1.0
        elif kind == "launch":
            pass
        elif "compute" in active:
            result *= sharing.read_while_computing if kind == "read" else sharing.copy_while_computing
        elif "start" in active:
            result *= sharing.read_while_starting if kind == "read" else sharing.copy_while_starting
        return result

    return speed
