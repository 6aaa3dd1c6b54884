"""The disk engine: many requests at once, in chunks, on a few threads per drive, past the page cache.

`preadv` into page-aligned memory releases the GIL for the whole transfer, so plain threads keep the drive's queue as
deep as an asynchronous interface would; a thread per request in flight is also the only thing an error needs to name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .arena import PAGE, HostArena, round_up
from .casting import cast
from .errors import ClosedError, DiskError
from .files import FileTable, OpenFile, disk_error
from .image import STAGING, Bounce, Window
from .layout import ITEMSIZE
from .requests import CHUNK, FINEST, THREADS, request_nbytes
from .throttle import Throttle

Pread = Callable[[int, Sequence[memoryview], int], int]
Task = tuple["Transfer", Callable[["_Worker"], None]]


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
        self._drives: dict[int, _Drive] = {}
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
        planned: list[tuple[OpenFile, Callable[[_Worker], None]]] = []
        for window in windows:
            file = self.files.get(window.path)
            planned.extend((file, task) for task in _WindowRead(self, file, window, into, on_data).tasks())
        for bounce in bounces:
            file = self.files.get(bounce.path)
            planned.extend((file, task) for task in _bounce_tasks(self, file, bounce, into, on_data))
        return self._submit(planned, urgent)

    def write(self, path: str, offset: int, data: memoryview) -> Transfer:
        """Write page-aligned `data` to a page-aligned `offset` of a file of ours. Not durable: see the block store."""
        assert offset % PAGE == 0, offset
        assert len(data) % PAGE == 0, len(data)
        file = self.files.get(path, writable=True)
        step = self.chunk_nbytes
        spans = [(at, min(step, len(data) - at)) for at in range(0, len(data), step)]
        return self._submit([(file, _write_task(self, file, offset + at, data[at : at + n])) for at, n in spans], False)

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

    def _submit(self, planned: list[tuple[OpenFile, Callable[[_Worker], None]]], urgent: bool) -> Transfer:
        transfer = Transfer(len(planned))
        by_drive: dict[int, list[Task]] = {}
        for file, task in planned:
            by_drive.setdefault(file.device, []).append((transfer, task))
        for device, tasks in by_drive.items():
            with self._lock:
                if self._closed:
                    raise ClosedError("the disk engine is closed")
                if device not in self._drives:
                    self._drives[device] = _Drive(self.threads, self.staging_nbytes)
                drive = self._drives[device]
            drive.put(tasks, urgent)
        return transfer


def _preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    return os.preadv(fd, buffers, offset)


def _pwritev(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    return os.pwritev(fd, buffers, offset)


class _Drive:
    """The queue and the threads of one drive: a slow drive never holds up a fast one."""

    def __init__(self, threads: int, staging_nbytes: int) -> None:
        self.urgent: deque[Task] = deque()
        self.normal: deque[Task] = deque()
        self._condition = threading.Condition()
        self._closed = False
        self.workers = [_Worker(self, number, staging_nbytes) for number in range(threads)]
        for worker in self.workers:
            worker.start()

    def put(self, tasks: list[Task], urgent: bool) -> None:
        with self._condition:
            if not self._closed:
                (self.urgent if urgent else self.normal).extend(tasks)
                self._condition.notify(len(tasks))
                return
        for transfer, _ in tasks:  # closed since the caller looked: no thread is left to take them
            transfer.part_done(ClosedError("the disk engine is closed"))

    def take(self) -> Task | None:
        with self._condition:
            while not (self.urgent or self.normal or self._closed):
                self._condition.wait()
            if self.urgent:
                return self.urgent.popleft()
            return self.normal.popleft() if self.normal else None

    def close(self) -> None:
        with self._condition:
            self._closed = True
            for transfer, _ in [*self.urgent, *self.normal]:
                transfer.cancel()
            self._condition.notify_all()
        for worker in self.workers:
            worker.join()


class _Worker(threading.Thread):
    """One I/O thread. Counters are its own, so no lock is taken per request."""

    def __init__(self, drive: _Drive, number: int, staging_nbytes: int) -> None:
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


class _WindowRead:
    """The chunks of one window, and the move that ends it."""

    def __init__(
        self,
        engine: DiskEngine,
        file: OpenFile,
        window: Window,
        into: memoryview,
        on_data: Callable[[int, int], None] | None,
    ) -> None:
        self.engine, self.file, self.window, self.into, self.on_data = engine, file, window, into, on_data
        self._lock = threading.Lock()
        self._step = request_nbytes(
            window.nbytes,
            threads=engine.threads,
            chunk_nbytes=engine.chunk_nbytes,
            finest_nbytes=engine.finest_nbytes,
        )
        self._starts = range(0, window.nbytes, self._step)
        self._left = len(self._starts)

    def tasks(self) -> list[Callable[[_Worker], None]]:
        return [lambda worker, at=at: self._read(worker, at) for at in self._starts]  # type: ignore[misc]

    def _read(self, worker: _Worker, at: int) -> None:
        window = self.window
        stop = min(at + self._step, window.nbytes)
        view = self.into[window.offset + at : window.offset + stop]
        read_into(self.engine, worker, self.file, window.file_offset + at, view, window.needed_nbytes - at)
        if self.on_data is not None:
            data_stop = window.data_offset + window.data_nbytes
            self.on_data(max(window.offset + at, window.data_offset), min(window.offset + stop, data_stop))
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last and window.final_offset != window.data_offset:
            base = ctypes.addressof(ctypes.c_char.from_buffer(self.into))
            ctypes.memmove(base + window.final_offset, base + window.data_offset, window.data_nbytes)


def _bounce_tasks(
    engine: DiskEngine, file: OpenFile, bounce: Bounce, into: memoryview, on_data: Callable[[int, int], None] | None
) -> list[Callable[[_Worker], None]]:
    wide, narrow = ITEMSIZE[bounce.source_dtype], ITEMSIZE[bounce.target_dtype]

    def read(worker: _Worker, at: int, nbytes: int) -> None:
        start = bounce.file_offset + at
        skew = start % PAGE
        window = worker.staging[: round_up(skew + nbytes)]
        read_into(engine, worker, file, start - skew, window, skew + nbytes)
        first = bounce.offset + at // wide * narrow
        last = first + nbytes // wide * narrow
        cast(window[skew : skew + nbytes], into[first:last], bounce.source_dtype, bounce.target_dtype)
        if on_data is not None:
            on_data(first, last)

    return [
        lambda worker, at=at: read(worker, at, min(engine.staging_nbytes, bounce.nbytes - at))  # type: ignore[misc]
        for at in range(0, bounce.nbytes, engine.staging_nbytes)
    ]


def read_into(
    engine: DiskEngine, worker: _Worker, file: OpenFile, offset: int, view: memoryview, needed_nbytes: int
) -> None:
    """Fill `view` from `offset`, of which at least the first `needed_nbytes` must exist (the rest may be past the end).

    Raises:
        DiskError: the drive failed, or the file is shorter than it was when it was opened.
    """
    needed = min(needed_nbytes, len(view))
    if engine.throttle is not None:
        engine.throttle.wait_until(engine.throttle.reserve(len(view)))
    got = 0
    while got < needed:
        direct = file.direct  # before the attempt: another thread may find meanwhile that it is refused
        try:
            count = engine.pread(file.fd, [view[got:]], offset + got)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise disk_error("read", file.path, offset + got, len(view) - got, error) from error
            if got % PAGE == 0 or os.fstat(file.fd).st_size >= offset + needed:
                file.refuse_direct()
                engine.files.tell_buffered(file.path)
                continue
            count = 0  # a direct read ended inside a page because the file does
        if count == 0:
            raise DiskError(
                f"cannot read {needed - got} bytes at offset {offset + got} of {file.path}: the file ends there, "
                f"though it was longer when it was opened; it was truncated or replaced: download it again"
            )
        got += count
    worker.read_nbytes += len(view)
    worker.reads += 1
    file.drop_cache(offset, len(view))


def _write_task(engine: DiskEngine, file: OpenFile, offset: int, view: memoryview) -> Callable[[_Worker], None]:
    def write(worker: _Worker) -> None:
        if engine.throttle is not None:
            engine.throttle.wait_until(engine.throttle.reserve(len(view)))
        done = 0
        while done < len(view):
            direct = file.direct
            try:
                count = engine.pwrite(file.fd, [view[done:]], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    file.refuse_direct()
                    engine.files.tell_buffered(file.path)
                    continue
                raise disk_error("write", file.path, offset + done, len(view) - done, error) from error
            if count == 0:
                raise DiskError(
                    f"cannot write {len(view) - done} bytes at offset {offset + done} of {file.path}: the system takes "
                    "none of them and gives no reason; check the drive, then run again"
                )
            done += count
            worker.written_nbytes += count
        worker.writes += 1
        file.drop_cache(offset, len(view))

    return write
