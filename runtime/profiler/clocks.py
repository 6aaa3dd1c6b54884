"""Where the times of spans come from. CUDA's clock has a file of its own."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol

from .schema import NONE

LOOK_NS: Final = 20_000_000
"""How often a device is looked for. Asking at every span would cost more than the span does."""


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

    @property
    def spent_ns(self) -> int:
        """What beginning and ending spans has taken, where that is worth counting."""
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

    @property
    def spent_ns(self) -> int:
        """Reading a clock costs next to nothing."""
        return 0


class LateClock:
    """The host's clock until a program uses a device, and that device's from then on.

    A span that began by one clock ends by the same. Thread-safe.

    Args:
        clock: The host's, nanoseconds.
        find: The device's clock, if there can be one by now; asked now and then at the beginning of spans, in the
            thread that computes. An error is told to `failed`, and it is not asked again.
    """

    def __init__(
        self, clock: Callable[[], int], find: Callable[[], Clock | None], failed: Callable[[Exception], None]
    ) -> None:
        self._clock = clock
        self._find = find
        self._failed = failed
        self._device: Clock | None = None
        self._looks_at: float = 0
        """When to look for a device again."""
        self._lock = threading.Lock()

    def begin(self) -> int | tuple[Clock, Any]:
        """By the device's clock, once there is one."""
        device = self._device
        if device is None:
            now = self._clock()
            if now < self._looks_at:
                return now
            device = self._look(now)
            if device is None:
                return now
        return device, device.begin()

    def end(self, begun: int | tuple[Clock, Any], done: Callable[[int, int, int], None]) -> None:
        """By the clock that it began by."""
        if isinstance(begun, int):
            done(NONE, begun, self._clock())
        else:
            device, token = begun
            device.end(token, done)

    @property
    def spent_ns(self) -> int:
        """What recording events on the device has taken beyond what the host's clock takes."""
        return 0 if self._device is None else self._device.spent_ns

    def poll(self) -> None:
        """The host's clock has nothing left to tell."""
        if self._device is not None:
            self._device.poll()

    def finish(self) -> None:
        """The host's clock waits for nothing."""
        self._looks_at = math.inf
        if self._device is not None:
            self._device.finish()

    def _look(self, now: int) -> Clock | None:
        if not self._lock.acquire(blocking=False):
            return None  # another thread is just at it
        try:
            if self._device is None and now >= self._looks_at:
                self._looks_at = now + LOOK_NS
                self._device = self._find()
        except RuntimeError as error:
            self._looks_at = math.inf
            self._failed(error)
        finally:
            self._lock.release()
        return self._device
