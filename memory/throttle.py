"""A token bucket that slows a link down to a stated rate, for the emulated device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

LAG_S: Final = 0.005


class Throttle:
    """Lets bytes pass at `rate` bytes per second. Transfers on one link queue; idle time is not saved up.

    A sleep ends late by a fraction of a millisecond; a request that comes within `LAG_S` of the end of the one before
    starts at that end, so that lateness does not add up over the pieces of a transfer.
    """

    def __init__(
        self,
        rate: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.rate = rate
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_at = 0.0

    def reserve(self, nbytes: int) -> float:
        """Take the link for `nbytes` and return the time at which they have passed."""
        with self._lock:
            now = self._clock()
            start = self._free_at if now - self._free_at <= LAG_S else now
            self._free_at = start + nbytes / self.rate
            return self._free_at

    def wait_until(self, when: float) -> None:
        """Sleep until `when`, a time given by `reserve`."""
        remaining = when - self._clock()
        if remaining > 0:
            self._sleep(remaining)
