"""The handle of one commit."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

REPORT_S: Final = 10.0
"""How often a wait says what it waits for."""


class Commit:
    """A commit on its way. Done when it is published and durable, or when it has failed."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.error: Exception | None = None
        """Why it was not published; None while it is under way, and when it was."""
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._callbacks: list[Callable[[Commit], None]] = []

    def done(self) -> bool:
        """Whether it is over, one way or the other."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is published; False after `timeout` seconds. Raises the commit's error."""
        waited = 0.0
        while timeout is None and not self._done.wait(REPORT_S):  # a drive may take its time; the publisher has a limit
            waited += REPORT_S
            logger.warning("commit %d is being published since %.0f s", self.number, waited)
        finished = self._done.wait(timeout)
        if finished and self.error is not None:
            raise self.error
        return finished

    def add_done_callback(self, callback: Callable[[Commit], None]) -> None:
        """Call back once, from the publishing thread, or at once if done already. It must be quick."""
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(callback)
                return
        self._call(callback)

    def finish(self, error: Exception | None) -> None:
        """Say that it is over. For the publisher."""
        with self._lock:
            self.error = error
            self._done.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            self._call(callback)

    def _call(self, callback: Callable[[Commit], None]) -> None:
        try:
            callback(self)
        except Exception:  # a caller's mistake must not end the thread that later commits need
            logger.exception("a callback of commit %d failed", self.number)
