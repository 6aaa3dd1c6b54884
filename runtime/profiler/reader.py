"""Reading a profile's file: whole, or what was added since the last look. What is damaged is passed over and told."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np

from ...memory.errors import ProfileError
from .profile import Columns, Profile
from .schema import MAJOR, RECORDS, Record, Tables, fields_of
from .segments import MAGIC, PREFIX, Frame, Segment, decode, newer, time_field

_CHUNK_NBYTES: Final = 2**20
_MOST_DAMAGE: Final = 100
"""Damaged places after which the rest of a file is passed over: each can cost a look at all that follows it."""
LIMIT_NBYTES: Final = 8 * 2**30
"""What the records of one profile may take in memory; 64 to 88 bytes each."""


def read_profile(path: str | os.PathLike[str], *, limit_nbytes: int = LIMIT_NBYTES) -> Profile:
    """All that can be read of the profile at `path`, sorted by time. What cannot is in its `problems`.

    Records that take more than `limit_nbytes` of memory together are left out, from the first segment on that does not
    fit.

    Raises:
        ProfileError: there is no such file, it is no profile, nothing in it can be read, or it is of a newer major
            version.
    """
    with _opened(path) as file:
        if file.nbytes == 0:
            raise ProfileError(f"{file.path} is empty: nothing was recorded into it")
        scan = _Scan(file, 0)
        parts = _Parts.of(scan.segments(), limit_nbytes)
        if parts is None:
            raise ProfileError(scan.nothing_found())
        scan.finish()
        return parts.profile(scan.problems, whole=True)


def follow(path: str | os.PathLike[str], offset: int) -> tuple[Profile | None, int]:
    """What was added to the profile at `path` since a call that returned `offset` (0 to begin with), and a new offset.

    None where no whole segment was added. A file that is shorter than `offset` was made anew, and is read from its
    start: its header has another `run`. Tables are those of the new segments only.

    Raises:
        ProfileError: as `read_profile`, but for an empty file, which may be one that is just being made.
    """
    with _opened(path) as file:
        start = offset if 0 <= offset <= file.nbytes else 0
        scan = _Scan(file, start)
        parts = _Parts.of(scan.segments(), LIMIT_NBYTES)
        if parts is not None:
            return parts.profile(scan.problems, whole=False), scan.offset
        if scan.newer is not None or (start == 0 and file.nbytes and not scan.may_grow):
            raise ProfileError(scan.nothing_found())
        return None, start  # what is damaged is told with the next segment that can be read


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """An open file, of the size that it had when it was opened: it may be growing."""

    path: str
    fd: int
    nbytes: int

    def read(self, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` from `offset` on; fewer at the end."""
        found = b""
        while len(found) < nbytes:
            piece = os.pread(self.fd, nbytes - len(found), offset + len(found))
            if not piece:
                break
            found = found + piece if found else piece
        return found

    def find(self, what: bytes, offset: int) -> int:
        """Where `what` comes next, from `offset` on; -1 where it does not."""
        while offset < self.nbytes:
            # Pieces overlap by what a match may hang over.
            found = self.read(offset, _CHUNK_NBYTES + len(what) - 1).find(what)
            if found >= 0:
                return offset + found
            offset += _CHUNK_NBYTES
        return -1


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[_File]:
    name = os.fspath(path)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without a writer would block
    except (OSError, ValueError) as error:
        raise ProfileError(f"cannot open {name}: {_reason(error)}") from error
    try:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            raise ProfileError(f"{name} is a folder, not a profile: name the file in it")
        if not stat.S_ISREG(found.st_mode):
            raise ProfileError(f"{name} is not a plain file: a profile cannot be read from it")
        yield _File(path=name, fd=fd, nbytes=found.st_size)
    except OSError as error:
        raise ProfileError(f"cannot read {name}: {_reason(error)}") from error
    finally:
        os.close(fd)


def _reason(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", None) or error)


class _Scan:
    """The segments of a file from an offset on, and what is wrong between them."""

    def __init__(self, file: _File, offset: int) -> None:
        self.offset = offset
        """Where reading goes on: behind all that is done with."""
        self.problems: list[str] = []
        self.newer: Frame | None = None
        """A segment of a newer major version."""
        self._file = file

    def segments(self) -> Iterator[Segment]:
        """What can be read, in the order of the file."""
        while self.offset < self._file.nbytes:
            frame = Frame.of(self._file.read(self.offset, PREFIX.size))
            found = self._decoded(frame)
            if isinstance(found, Segment):
                assert frame is not None
                self.offset += frame.nbytes
                yield found
            elif not self._pass_over(found):
                return

    def finish(self) -> None:
        """Tell of what is left at the end of a file that is not expected to grow."""
        left = self._file.nbytes - self.offset
        if left > 0:
            self.problems.append(
                f"the end is cut off or damaged: the last {left} bytes, from byte {self.offset} on, cannot be read"
            )

    def nothing_found(self) -> str:
        """Why there is no profile in the file."""
        path = self._file.path
        if self.newer is not None:
            return f"cannot read {path}: {newer(self.newer)}"
        if self.problems or self.may_grow:
            reason = self.problems[0] if self.problems else "its first segment is cut off or damaged"
            return f"cannot read {path}: it is damaged, and no segment of it is whole: {reason}"
        return f"{path} is not a profile: penstock did not write it, or its start is missing"

    @property
    def may_grow(self) -> bool:
        """Whether what is left can be the beginning of a segment."""
        return MAGIC.startswith(self._file.read(self.offset, len(MAGIC)))

    def _decoded(self, frame: Frame | None) -> Segment | str:
        """The segment at the offset, or why it cannot be read."""
        if frame is None:
            return "no segment begins there"
        if frame.major > MAJOR:
            self.newer = frame
            return f"version {frame.major}.{frame.minor} of the format"
        # Before anything of that size is read.
        if not frame.plausible or self.offset + frame.nbytes > self._file.nbytes:
            return f"{frame.nbytes} bytes were to follow"
        try:
            return decode(self._file.read(self.offset, frame.nbytes))
        except ProfileError as error:
            return str(error)

    def _pass_over(self, reason: str) -> bool:
        """Go on to what looks like the next segment. False at the end, which is left for when more has been written."""
        following = self._file.find(MAGIC, self.offset + 1)
        if following < 0:
            return False
        if len(self.problems) == _MOST_DAMAGE:
            self.problems.append(f"too much is damaged: all from byte {self.offset} on is passed over")
            self.offset = self._file.nbytes
            return False
        self.problems.append(
            f"{following - self.offset} bytes from byte {self.offset} on are damaged ({reason}) and passed over"
        )
        self.offset = following
        return True


class _Parts:
    """What the segments of one run sum to."""

    def __init__(self, first: Segment, limit_nbytes: int) -> None:
        self._limit_nbytes = limit_nbytes
        self._header = first.header
        self._footer = first.footer
        self._columns: dict[type[Record], list[Columns]] = {kind: [] for kind in RECORDS}
        self._tables: Tables = {name: {} for name in first.tables}
        self._nbytes = self._count = self._left_out = self._foreign = 0

    @staticmethod
    def of(segments: Iterator[Segment], limit_nbytes: int) -> _Parts | None:
        """All of them; None of none."""
        parts = None
        for segment in segments:
            parts = parts or _Parts(segment, limit_nbytes)
            parts._add(segment)
        return parts

    def profile(self, problems: Sequence[str], *, whole: bool) -> Profile:
        """The profile of all parts; `whole` where it begins with the run, so that missing records can be counted."""
        return Profile(
            header=self._header,
            footer=self._footer,
            columns={kind: _sorted(Columns.joined(kind, parts)) for kind, parts in self._columns.items()},
            problems=(*problems, *self._problems(whole)),
            **self._tables,
        )

    def _add(self, segment: Segment) -> None:
        if segment.header.run != self._header.run:
            self._foreign += 1
            return
        self._header, self._footer = segment.header, segment.footer
        for name, rows in segment.tables.items():
            self._tables[name].update(rows)
        count = sum(map(len, segment.columns.values()))
        self._count += count
        self._nbytes += sum(len(columns) * len(fields_of(kind)) * 8 for kind, columns in segment.columns.items())
        if self._nbytes > self._limit_nbytes:
            self._left_out += count
            return
        for kind, columns in segment.columns.items():
            self._columns[kind].append(columns)

    def _problems(self, whole: bool) -> Iterator[str]:
        written = self._footer.recorded - self._footer.dropped
        if whole and written > self._count:
            yield f"{written - self._count} of {written} records are missing"
        if self._left_out:
            yield (
                f"the last {self._left_out} of {self._count} records are left out: all take {self._nbytes} bytes of "
                f"memory, and {self._limit_nbytes} are allowed"
            )
        if self._foreign:
            yield f"{self._foreign} segments are of another run and left out"


def _sorted(columns: Columns) -> Columns:
    times = getattr(columns, time_field(columns.record))
    if np.all(times[1:] >= times[:-1]):
        return columns
    return columns.where(np.argsort(times, kind="stable"))
