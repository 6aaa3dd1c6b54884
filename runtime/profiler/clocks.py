"""Where the times of spans come from. CUDA's clock has a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .schema import NONE


class Clock(Protocol):
    """Where the times of a span come from."""

    def begin(self) -> Any:
        """A span starts in the calling thread."""
        ...

    def end(self, begun: Any, done: Callable[[int, int, int], None]) -> None:
        """It ends; `done(launched, start, end)` is called once its times are known, perhaps much later."""
        ...

    def poll(self) -> None:
        """Tell the times that have become known."""
        ...

    def finish(self) -> None:
        """Wait for the times that are not known yet, and tell them."""
        ...


class HostClock:
    """Spans of the host itself: what a CPU computes."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock

    def begin(self) -> int:
        """Now."""
        return self._clock()

    def end(self, begun: int, done: Callable[[int, int, int], None]) -> None:
        """Known at once."""
        done(NONE, begun, self._clock())

    def poll(self) -> None:
        """Nothing is left to tell."""

    def finish(self) -> None:
        """Nothing is left to tell."""
