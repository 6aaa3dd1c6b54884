"""The writer: a thread that moves records from the ring into the file, one segment about every second."""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import logging
import os
import stat
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from ...memory.errors import DiskError, UsageError
from .profile import Columns
from .ring import Ring
from .schema import RECORDS, Footer, Header, Record, Tables, fields_of
from .segments import Segment, encode, rows_used

logger = logging.getLogger(__name__)

MOST_RECORDS: Final = 2**20
"""In one segment: what bounds the memory that writing it takes."""
_IDLE_NS: Final = 3 * 10**9
"""How long nothing is written while nothing is recorded. Then a footer is, so that a reader sees that the run lives."""
_TICKS: Final = 4
"""Looks at the ring per interval: one that is half full is emptied before its time."""
_CLOSING_S: Final = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WriterStatistics:
    """What became of the records so far: recorded = in the file + dropped, but for those still in the ring."""

    path: str
    segments: int
    nbytes: int
    """Of the file."""
    recorded: int
    dropped: int
    """Lost because the ring was full, or because they could not be written."""
    own_ns: int
    """CPU time of the recorder: hooks, encoding, writing."""
    failure: str
    """Why records could not be written, in one line; "" where all were."""


class ProfileWriter:
    """Writes a profile from its creation on, until `close()`.

    Each segment is with the operating system as soon as it is written, so that a killed process loses no more than an
    interval. Nothing that goes wrong while it runs stops the program that is profiled: what cannot be written is logged
    once, counted as dropped, and told by `close`. A forked child writes nothing, and its `close` does nothing.
    """

    header: Header
    """What the next segments say that the run is. May be replaced while it runs, as more becomes known."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: Header,
        ring: Ring,
        tables: Tables,
        *,
        interval_s: float = 1.0,
        force: bool = False,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Make the file, write a first segment without records into it, and start the thread.

        `tables` (modules, blocks, storages, strings) may grow while the writer runs; a row must be there before a
        record that points at it. `interval_s` is the time between segments, in seconds; `clock` tells nanoseconds.

        Raises:
            UsageError: there is something at `path` and `force` is false, or another process writes it, or it is not a
                plain file.
            DiskError: the file cannot be made or written.
        """
        self.header = header
        self.path = os.path.abspath(path)
        self._ring = ring
        self._half_full = ring.statistics().capacity // 2
        self._tables = tables
        self._interval_s = interval_s
        self._clock = clock
        self._last_ns = clock()
        self._pid = os.getpid()
        self._end = self._segments = self._written = self._lost = 0
        self._failure = ""
        self._ended_by = ""
        self._hooks_ns: dict[int, int] = {}
        self._thread_ns = 0
        self._stop = threading.Event()
        self._fd = _create(self.path, force)
        try:
            self._put(encode(self._segment({}, kept=0, lost=0, last=False)))
        except BaseException as error:
            os.close(self._fd)
            with suppress(OSError):
                os.unlink(self.path)
            if isinstance(error, OSError):
                raise DiskError(f"cannot write {self.path}: {error.strerror}. Choose another file.") from error
            raise
        os.register_at_fork(after_in_child=functools.partial(_forget_in_child, weakref.ref(self)))
        self._thread = threading.Thread(target=self._run, name="penstock-profile-writer", daemon=True)
        self._thread.start()

    def add_own_ns(self, nanoseconds: int) -> None:
        """Count CPU time that a hook took for recording. Thread-safe."""
        # Each thread has a sum of its own: no lock, and no addition is lost.
        thread = threading.get_ident()
        self._hooks_ns[thread] = self._hooks_ns.get(thread, 0) + nanoseconds

    def statistics(self) -> WriterStatistics:
        """What was written so far."""
        ring = self._ring.statistics()
        return WriterStatistics(
            path=self.path,
            segments=self._segments,
            nbytes=self._end,
            recorded=ring.recorded,
            dropped=ring.dropped + self._lost,
            own_ns=self._own_ns(),
            failure=self._failure,
        )

    def close(self, failure: str = "") -> WriterStatistics:
        """Write what is left and the last footer, stop the thread, close the file. More than once does no harm.

        `failure` names the exception that ended the run. Does not raise, because the program that was profiled goes
        on: what could not be written is in the result's `failure`, and logged.
        """
        if os.getpid() != self._pid or self._fd < 0:
            return self.statistics()
        self._ended_by = failure
        self._stop.set()
        self._thread.join(_CLOSING_S)
        if self._thread.is_alive():  # the file stays open: the thread may yet come back from the disk, and write
            self._failure = f"cannot finish {self.path}: the disk has not answered for {_CLOSING_S:.0f} s"
        else:
            fd, self._fd = self._fd, -1
            os.close(fd)
        found = self.statistics()
        if found.failure:
            logger.warning("%s; %d of %d records are lost", found.failure, found.dropped, found.recorded)
        return found

    def _run(self) -> None:
        ticks = itertools.count(1)
        while not self._stop.wait(self._interval_s / _TICKS):
            if next(ticks) % _TICKS == 0 or self._ring.waiting > self._half_full:
                self._write(last=False)
        self._write(last=True)

    def _write(self, *, last: bool) -> None:
        """Write what the ring holds; a footer alone at the end, and now and then where nothing is recorded."""
        records = self._ring.drain()
        if not (records or last or self._clock() - self._last_ns >= _IDLE_NS):
            return
        for first in range(0, max(len(records), 1), MOST_RECORDS):
            some = records[first : first + MOST_RECORDS]
            self._write_segment(some, last=last and first + MOST_RECORDS >= len(records))
            self._thread_ns = time.thread_time_ns()

    def _write_segment(self, records: Sequence[Record], *, last: bool) -> None:
        lost = len(records)
        try:
            columns = _columns_of(records)
            kept = sum(map(len, columns.values()))
            self._put(encode(self._segment(columns, kept=kept, lost=lost - kept, last=last)))
            self._written += kept
            lost -= kept
            if lost:
                raise ValueError(f"{lost} records are not made of whole numbers of 64 bits")
        except Exception as error:  # whatever it is, it must not reach the program, nor stop the thread
            self._fail(error)
        self._lost += lost

    def _segment(self, columns: dict[type[Record], Columns], *, kept: int, lost: int, last: bool) -> Segment:
        # Nothing is said of records still in the ring: what is in the file and what is lost sum to `recorded`.
        dropped = self._ring.statistics().dropped + self._lost + lost
        footer = Footer(
            written_ns=self._clock(),
            recorded=self._written + kept + dropped,
            dropped=dropped,
            own_ns=self._own_ns(),
            last=last,
            failure=self._ended_by if last else "",
        )
        return Segment(header=self.header, footer=footer, columns=columns, tables=rows_used(columns, self._tables))

    def _put(self, data: bytes) -> None:
        """Append a whole segment, or nothing."""
        done = 0
        try:
            while done < len(data):
                count = os.pwrite(self._fd, memoryview(data)[done:], self._end + done)
                if count == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                done += count
        except OSError:
            with suppress(OSError):  # the next segment overwrites what cannot be cut off
                os.ftruncate(self._fd, self._end)
            raise
        self._end += len(data)
        self._segments += 1
        self._last_ns = self._clock()

    def _own_ns(self) -> int:
        return self._thread_ns + sum(list(self._hooks_ns.values()))  # a list: threads may join in meanwhile

    def _fail(self, error: Exception) -> None:
        if self._failure:
            return
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        self._failure = f"cannot write {self.path}: {reason}"
        logger.warning("%s. The run goes on; records are lost.", self._failure)

    def _forget(self) -> None:
        # Closing the copy does not let go of the lock, which is the parent's.
        with suppress(OSError):
            os.close(self._fd)
        self._fd = -1


def _forget_in_child(writer: weakref.ref[ProfileWriter]) -> None:
    alive = writer()
    if alive is not None and alive._fd >= 0:
        alive._forget()


def _create(path: str, force: bool) -> int:
    """A descriptor of an empty file that nobody else writes."""
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder. Name a file in it, such as {path}/run.prof.")
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe without a reader would block
    try:
        fd = os.open(path, flags | (0 if force else os.O_EXCL), 0o666)
    except FileExistsError as error:
        raise UsageError(f"{path} exists. Choose another file, or replace it with --force (force=True).") from error
    except OSError as error:
        raise DiskError(f"cannot make {path}: {error.strerror}. Choose another file.") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError(f"{path} is not a plain file. Choose another one for the profile.")
        _lock(path, fd)
        os.ftruncate(fd, 0)
    except OSError as error:
        os.close(fd)
        raise DiskError(f"cannot write {path}: {error.strerror}. Choose another file.") from error
    except UsageError:
        os.close(fd)
        raise
    return fd


def _lock(path: str, fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"{path} is being written by another process. Choose another file.") from error
    except OSError as error:  # not all filesystems have locks
        logger.debug("cannot lock %s: %s", path, error.strerror)


def _columns_of(records: Sequence[Record]) -> dict[type[Record], Columns]:
    """The records as columns, without those that a file cannot hold."""
    by_kind: dict[type[Record], list[Record]] = {kind: [] for kind in RECORDS}
    for record in records:
        if type(record) in by_kind:
            by_kind[type(record)].append(record)
    columns = {}
    for kind, items in by_kind.items():
        try:
            flat = _flat(items)
        except (TypeError, OverflowError):
            items = [item for item in items if _is_fit(item)]
            flat = _flat(items)
        if items:
            table = np.frombuffer(flat, dtype=np.int64).reshape(len(items), -1).T.copy()
            columns[kind] = Columns(kind, dict(zip(fields_of(kind), table, strict=True)))
    return columns


def _flat(records: Iterable[Record]) -> array[int]:
    return array("q", itertools.chain.from_iterable(map(msgspec.structs.astuple, records)))


def _is_fit(record: Record) -> bool:
    try:
        return len(_flat((record,))) > 0
    except (TypeError, OverflowError):
        return False
