"""The handle of a request to a drive: whether it is done, how it ended, and whom to tell."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Transfer:
    """The handle of one request. Done when every chunk is, also after an error or a cancellation."""

    def __init__(self, parts: int) -> None:
        self._left = parts
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._callbacks: list[Callable[[Transfer], None]] = []
        self.cancelled = False
        self.error: Exception | None = None
        if parts == 0:
            self._done.set()

    def done(self) -> bool:
        """Whether no thread will touch the destination any more."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until done; False after `timeout` seconds. Raises the request's error."""
        finished = self._done.wait(timeout)
        if self.error is not None and finished:
            raise self.error
        return finished

    def cancel(self) -> None:
        """Skip the chunks that have not started."""
        self.cancelled = True

    def add_done_callback(self, callback: Callable[[Transfer], None]) -> None:
        """Call back once, from the thread that finishes last, or at once if done already."""
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(callback)
                return
        callback(self)

    def part_done(self, error: Exception | None) -> None:
        """Count one chunk as finished."""
        with self._lock:
            self.error = self.error or error
            if error is not None:
                self.cancelled = True
            self._left -= 1
            if self._left:
                return
            self._done.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)
