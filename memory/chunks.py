"""Chunks of requests: what one thread reads or writes at a time, and what it does with the bytes."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from .arena import PAGE, round_up
from .casting import cast
from .drivequeue import Worker
from .errors import DiskError
from .files import OpenFile, disk_error
from .image import Bounce, Window
from .layout import ITEMSIZE
from .requests import request_nbytes

if TYPE_CHECKING:
    from .disk import DiskEngine


class WindowRead:
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

    def tasks(self) -> list[Callable[[Worker], None]]:
        """A piece of work for a thread each. The one that ends last moves the bytes to where they belong."""
        return [lambda worker, at=at: self._read(worker, at) for at in self._starts]  # type: ignore[misc]

    def _read(self, worker: Worker, at: int) -> None:
        window = self.window
        stop = min(at + self._step, window.nbytes)
        view = self.into[window.offset + at : window.offset + stop]
        _read_into(self.engine, worker, self.file, window.file_offset + at, view, window.needed_nbytes - at)
        if self.on_data is not None:
            data_stop = window.data_offset + window.data_nbytes
            self.on_data(max(window.offset + at, window.data_offset), min(window.offset + stop, data_stop))
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last and window.final_offset != window.data_offset:
            base = ctypes.addressof(ctypes.c_char.from_buffer(self.into))
            ctypes.memmove(base + window.final_offset, base + window.data_offset, window.data_nbytes)


def bounce_tasks(
    engine: DiskEngine, file: OpenFile, bounce: Bounce, into: memoryview, on_data: Callable[[int, int], None] | None
) -> list[Callable[[Worker], None]]:
    """The chunks of what passes through the buffer of a thread, which casts it on the way."""
    wide, narrow = ITEMSIZE[bounce.source_dtype], ITEMSIZE[bounce.target_dtype]

    def read(worker: Worker, at: int, nbytes: int) -> None:
        start = bounce.file_offset + at
        skew = start % PAGE
        window = worker.staging[: round_up(skew + nbytes)]
        _read_into(engine, worker, file, start - skew, window, skew + nbytes)
        first = bounce.offset + at // wide * narrow
        last = first + nbytes // wide * narrow
        cast(window[skew : skew + nbytes], into[first:last], bounce.source_dtype, bounce.target_dtype)
        if on_data is not None:
            on_data(first, last)

    return [
        lambda worker, at=at: read(worker, at, min(engine.staging_nbytes, bounce.nbytes - at))  # type: ignore[misc]
        for at in range(0, bounce.nbytes, engine.staging_nbytes)
    ]


def _read_into(
    engine: DiskEngine, worker: Worker, file: OpenFile, offset: int, view: memoryview, needed_nbytes: int
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


def write_task(engine: DiskEngine, file: OpenFile, offset: int, view: memoryview) -> Callable[[Worker], None]:
    """One chunk to be written."""

    def write(worker: Worker) -> None:
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
