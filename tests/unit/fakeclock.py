"""A clock that only moves when something takes time, and timers that ask it."""

from __future__ import annotations

import threading


class FakeClock:
    """Seconds. Threads that take time take turns."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def take(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds
