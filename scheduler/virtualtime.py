"""An asyncio loop whose clock stands still while anything can run, and jumps to the next timer when nothing can."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class DeadlockError(Exception):
    """Nothing is scheduled and nothing will ever be: what runs waits for itself."""


class _JumpingSelector(selectors.SelectSelector):
    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # All that runs is simulated in this thread: no file is waited for, and nobody wakes the loop from outside.
        if timeout is None:
            raise DeadlockError(f"nothing can run any more, at {self.loop.now:.6f} s")
        self.loop.now += timeout
        # Timers are due when they are due, not a nanosecond before; but what rounds to now is now.
        self.loop._clock_resolution = max(1e-12, 4 * math.ulp(self.loop.now))
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop. Its seconds are those of what is simulated, from 0."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)
        self._clock_resolution = 1e-12

    def time(self) -> float:
        """Simulated seconds."""
        return self.now

    def nanoseconds(self) -> int:
        """Simulated time as the executor's clock tells it."""
        return round(self.now * 1e9)


def run_virtually(loop: VirtualLoop, work: Coroutine[Any, Any, Result]) -> Result:
    """Run to the end, cancel what is left, and close the loop.

    Raises:
        DeadlockError: it waits for something that never comes.
    """
    try:
        return loop.run_until_complete(work)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()
