"""The queue of one drive and the threads that serve it: a slow drive never holds up a fast one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from .arena import PAGE, HostArena
from .errors import ClosedError
from .transfer import Transfer

Task = tuple[Transfer, Callable[["Worker"], None]]


class DriveQueue:
    """Hands chunks of requests to threads, urgent ones first.

    Args:
        threads: Requests in flight.
        staging_nbytes: Size of the buffer that each thread bounces through.
    """

    def __init__(self, threads: int, staging_nbytes: int) -> None:
        self.urgent: deque[Task] = deque()
        self.normal: deque[Task] = deque()
        self._condition = threading.Condition()
        self._closed = False
        self.workers = [Worker(self, number, staging_nbytes) for number in range(threads)]
        for worker in self.workers:
            worker.start()

    def put(self, tasks: list[Task], urgent: bool) -> None:
        """Queue chunks; those of a closed drive fail at once."""
        with self._condition:
            if not self._closed:
                (self.urgent if urgent else self.normal).extend(tasks)
                self._condition.notify(len(tasks))
                return
        for transfer, _ in tasks:  # closed since the caller looked: no thread is left to take them
            transfer.part_done(ClosedError("the disk engine is closed"))

    def take(self) -> Task | None:
        """The next chunk, waiting for one; None once the drive is closed and nothing is left."""
        with self._condition:
            while not (self.urgent or self.normal or self._closed):
                self._condition.wait()
            if self.urgent:
                return self.urgent.popleft()
            return self.normal.popleft() if self.normal else None

    def close(self) -> None:
        """Cancel what waits, and wait until the threads have ended."""
        with self._condition:
            self._closed = True
            for transfer, _ in [*self.urgent, *self.normal]:
                transfer.cancel()
            self._condition.notify_all()
        for worker in self.workers:
            worker.join()


class Worker(threading.Thread):
    """One I/O thread. Counters are its own, so no lock is taken per request."""

    def __init__(self, drive: DriveQueue, number: int, staging_nbytes: int) -> None:
        super().__init__(name=f"penstock-disk-{number}", daemon=True)
        self._drive = drive
        self._staging_nbytes = staging_nbytes
        self._staging: HostArena | None = None
        self.read_nbytes = self.written_nbytes = self.reads = self.writes = 0

    @property
    def staging(self) -> memoryview:
        """A small aligned buffer of this thread's own, made on first use."""
        if self._staging is None:
            self._staging = HostArena(self._staging_nbytes + 2 * PAGE, tier="staging")
        return self._staging.buffer

    def run(self) -> None:
        """Work until the drive is closed."""
        while (task := self._drive.take()) is not None:
            transfer, work = task
            error: Exception | None = None
            if not transfer.cancelled:
                try:
                    work(self)
                except Exception as failure:  # it must surface in the consumer's thread, whatever it is
                    error = failure
            del work, task
            transfer.part_done(error)
            del transfer
        if self._staging is not None:
            self._staging.close()
