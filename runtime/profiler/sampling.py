"""Gauges: what the system says about memory and energy, read at an interval in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from .meters import Reader
from .recorder import Recorder
from .schema import Gauge, Meter

INTERVAL_S: Final = {"light": 0.2, "full": 0.05}
"""By level. Each look takes a processor from the program for a moment."""


class Sampler:
    """Reads meters while it is entered, and once more at each end.

    Args:
        meters: Each with the function that reads it; one that raises OSError or RuntimeError is left out from then on.
        also: What else is to be done as often, in the same thread, before the meters are read, and once at the end.
    """

    def __init__(
        self,
        recorder: Recorder,
        meters: Sequence[tuple[Meter, Reader]],
        *,
        also: Sequence[Callable[[], None]] = (),
        interval_s: float,
    ) -> None:
        self._recorder = recorder
        self._meters = list(meters)
        self._also = also
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="penstock-sampler", daemon=True)
        self.own_ns = 0
        """CPU time of reading."""

    def __enter__(self) -> Sampler:
        self.read()
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        if self._recorder.alive:
            self._thread.join()
            for act in self._also:
                act()
            self.read()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            for act in self._also:
                act()
            self.read()
            self.own_ns = time.thread_time_ns()

    def add(self, meters: Sequence[tuple[Meter, Reader]]) -> None:
        """Read these too from now on. From any thread."""
        self._meters.extend(meters)

    def read(self) -> None:
        """Read all meters now."""
        for pair in list(self._meters):
            meter, value_of = pair
            try:
                value = value_of()
            except (OSError, RuntimeError, ValueError):
                self._meters.remove(pair)
                continue
            if value is not None:
                self._recorder.add(Gauge(at=self._recorder.clock(), meter=meter, value=value))
