"""Where the times of spans come from. CUDA's clock has a file of its own."""

from __future__ import annotations

import threading
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
        host: The clock to begin with.
        find: The device's clock, if there can be one by now; asked at the beginning of spans, in the thread that
            computes. An error is told to `failed`, and it is not asked again.
    """

    def __init__(self, host: Clock, find: Callable[[], Clock | None], failed: Callable[[Exception], None]) -> None:
        self._host = host
        self._find = find
        self._failed = failed
        self._device: Clock | None = None
        self._looks = True
        self._lock = threading.Lock()

    def begin(self) -> tuple[Clock, Any]:
        """By the device's clock, once there is one."""
        clock = self._device or (self._look() if self._looks else self._host)
        return clock, clock.begin()

    def end(self, begun: tuple[Clock, Any], done: Callable[[int, int, int], None]) -> None:
        """By the clock that it began by."""
        clock, token = begun
        clock.end(token, done)

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
        self._looks = False
        if self._device is not None:
            self._device.finish()

    def _look(self) -> Clock:
        if not self._lock.acquire(blocking=False):
            return self._host  # another thread is just at it
        try:
            if self._device is None and self._looks:
                self._device = self._find()
        except RuntimeError as error:
            self._looks = False
            self._failed(error)
        finally:
            self._lock.release()
        return self._device or self._host
