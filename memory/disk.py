"""The disk engine: many requests at once, in chunks, on a few threads per drive, past the page cache.

`preadv` into page-aligned memory releases the GIL for the whole transfer, so plain threads keep the drive's queue as
deep as an asynchronous interface would; a thread per request in flight is also the only thing an error needs to name.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .arena import PAGE, round_up
from .chunks import WindowRead, bounce_tasks, write_task
from .drivequeue import DriveQueue, Task, Worker
from .errors import ClosedError
from .files import FileTable, OpenFile
from .image import STAGING, Bounce, Window
from .requests import CHUNK, FINEST, THREADS
from .throttle import Throttle
from .transfer import Transfer

Pread = Callable[[int, Sequence[memoryview], int], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskStatistics:
    """Totals since the engine was made."""

    read_nbytes: int
    """Whole windows: a read that ends at the end of its file counts to the end of the page."""
    written_nbytes: int
    reads: int
    writes: int
    queued: int
    """Chunks waiting for a thread at this moment."""


class DiskEngine:
    """Reads images into slots and writes slots to files.

    Args:
        threads: Requests in flight per drive.
        chunk_nbytes: Size of one request, at most; a multiple of the page.
        finest_nbytes: Size of one request to read, at least, where there is more to read.
        staging_nbytes: Size of the buffer that each thread bounces through, taken on first use.
        throttle: Rate limit of an emulated disk; None for the real one.
        pread: Replaces `os.preadv`; a seam for fault injection.
        pwrite: Replaces `os.pwritev`, likewise.
    """

    def __init__(
        self,
        *,
        threads: int = THREADS,
        chunk_nbytes: int = CHUNK,
        finest_nbytes: int = FINEST,
        staging_nbytes: int = STAGING,
        throttle: Throttle | None = None,
        files: FileTable | None = None,
        pread: Pread | None = None,
        pwrite: Pread | None = None,
    ) -> None:
        assert chunk_nbytes % PAGE == 0, chunk_nbytes
        self.threads = threads
        self.chunk_nbytes = chunk_nbytes
        self.finest_nbytes = finest_nbytes
        self.staging_nbytes = round_up(staging_nbytes)
        self.files = files or FileTable()
        self.throttle = throttle
        self.pread: Pread = pread or _preadv
        self.pwrite: Pread = pwrite or _pwritev
        self._drives: dict[int, DriveQueue] = {}
        self._lock = threading.Lock()
        self._closed = False

    @staticmethod
    def own_nbytes(staging_nbytes: int, *, threads: int = THREADS) -> int:
        """Host memory that the engine itself takes per drive as soon as one request bounces."""
        return threads * (round_up(staging_nbytes) + 2 * PAGE)

    def read(
        self,
        windows: Sequence[Window],
        bounces: Sequence[Bounce],
        into: memoryview,
        *,
        urgent: bool = False,
        on_data: Callable[[int, int], None] | None = None,
    ) -> Transfer:
        """Fill `into` (a slot) from files.

        `on_data(start, stop)` is called from an I/O thread for each range of the slot that has just become valid
        (before any move); it must be quick. `urgent` requests overtake those that wait.

        Raises:
            ClosedError: the engine is closed.
            DiskError: a file cannot be opened. Later failures are in `Transfer.error`.
        """
        planned: list[tuple[OpenFile, Callable[[Worker], None]]] = []
        for window in windows:
            file = self.files.get(window.path)
            planned.extend((file, task) for task in WindowRead(self, file, window, into, on_data).tasks())
        for bounce in bounces:
            file = self.files.get(bounce.path)
            planned.extend((file, task) for task in bounce_tasks(self, file, bounce, into, on_data))
        return self._submit(planned, urgent)

    def write(self, path: str, offset: int, data: memoryview) -> Transfer:
        """Write page-aligned `data` to a page-aligned `offset` of a file of ours. Not durable: see the block store."""
        assert offset % PAGE == 0, offset
        assert len(data) % PAGE == 0, len(data)
        file = self.files.get(path, writable=True)
        step = self.chunk_nbytes
        spans = [(at, min(step, len(data) - at)) for at in range(0, len(data), step)]
        return self._submit([(file, write_task(self, file, offset + at, data[at : at + n])) for at, n in spans], False)

    def statistics(self) -> DiskStatistics:
        """A frozen record of the totals."""
        with self._lock:
            workers = [w for drive in self._drives.values() for w in drive.workers]
            queued = sum(len(drive.urgent) + len(drive.normal) for drive in self._drives.values())
        return DiskStatistics(
            read_nbytes=sum(w.read_nbytes for w in workers),
            written_nbytes=sum(w.written_nbytes for w in workers),
            reads=sum(w.reads for w in workers),
            writes=sum(w.writes for w in workers),
            queued=queued,
        )

    def close(self) -> None:
        """Cancel what waits, let what runs finish, stop the threads, close the files."""
        with self._lock:
            self._closed = True
            drives = list(self._drives.values())
        for drive in drives:
            drive.close()
        self.files.close()

    def _submit(self, planned: list[tuple[OpenFile, Callable[[Worker], None]]], urgent: bool) -> Transfer:
        transfer = Transfer(len(planned))
        by_drive: dict[int, list[Task]] = {}
        for file, task in planned:
            by_drive.setdefault(file.device, []).append((transfer, task))
        for device, tasks in by_drive.items():
            with self._lock:
                if self._closed:
                    raise ClosedError("the disk engine is closed")
                if device not in self._drives:
                    self._drives[device] = DriveQueue(self.threads, self.staging_nbytes)
                drive = self._drives[device]
            drive.put(tasks, urgent)
        return transfer


def _preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    return os.preadv(fd, buffers, offset)


def _pwritev(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    return os.pwritev(fd, buffers, offset)
