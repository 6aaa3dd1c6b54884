"""The file of a routing trace: segments of some steps each, checksummed, written while a model runs.

    magic (8) · major (2) · minor (2) · stored bytes (4) · bytes when inflated (4) · CRC-32 (4) · payload

All numbers are little-endian; the checksum covers the fields before it and the payload. The payload is msgpack,
deflated: the header of the trace, the steps, and the arrays of `Trace` as bytes in C order, tokens before layers, so
that neighbours in time are neighbours in the file. Numbers of experts take one byte where there are fewer than 256 of
them. A segment goes into the file in one piece, so a process that is killed leaves whole segments, and at most one that
is cut off at the end: a reader takes the steps before it and says so. Damage in any other place is an error.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import numpy as np

from ...memory.errors import DiskError, TraceError, UsageError
from .trace import PHASES, Step, Trace, TraceHeader, steps_of, trace_of

MAGIC: Final = b"\x89Penmoe\n"
MAJOR: Final = 1
"""Readers refuse files of a newer major version."""
MINOR: Final = 0
"""Grows when fields are added, which older readers pass over."""
SEGMENT_NBYTES: Final = 4 * 2**20
"""Of the arrays of a segment, about: what a killed process loses at most, and what writing it takes of memory."""
_PREFIX: Final = struct.Struct("<8sHHIII")
_CHECKED: Final = _PREFIX.size - 4
_INFLATION: Final = 1032
"""Deflate makes nothing smaller than to 1 in 1032: what claims more is damaged or hostile."""
_LARGEST: Final = 2**30
"""Bytes of a segment, in the file and inflated."""
_LEVEL: Final = 6


class _Payload(msgspec.Struct, frozen=True, kw_only=True):
    """The inflated part of a segment."""

    header: TraceHeader
    first_step: int
    phases: bytes
    lengths: tuple[int, ...]
    requests: bytes
    experts: bytes
    scores: bytes | None = None
    guesses: bytes | None = None


class TraceWriter:
    """Writes a trace step by step. The file is there from the beginning, and what is written can be read at any
    time."""

    def __init__(
        self, path: str | os.PathLike[str], header: TraceHeader, *, segment_nbytes: int = SEGMENT_NBYTES
    ) -> None:
        """Make the file.

        Raises:
            UsageError: there is something at `path`: nothing is overwritten.
            DiskError: it cannot be made.
        """
        self._path = os.fspath(path)
        self._header = header
        self._most = segment_nbytes
        self._waiting: list[Step] = []
        self._waiting_nbytes = 0
        self._steps = 0
        self._end = 0
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError as error:
            raise UsageError(f"{self._path} is there already: remove it, or name another file") from error
        except OSError as error:
            raise DiskError(f"cannot make {self._path}: {error.strerror}. Name another file.") from error

    def add(self, step: Step) -> None:
        """Take one more step; it is written with those after it.

        Raises:
            TraceError: it is not what the header says.
            DiskError: it cannot be written. The file stays as it was before.
        """
        trace_of(self._header, [step])  # raises here, where whoever recorded it can be told, and not when it is read
        self._waiting.append(step)
        self._waiting_nbytes += sum(a.nbytes for a in (step.experts, step.scores, step.guesses) if a is not None)
        if self._waiting_nbytes >= self._most:
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            DiskError: it cannot be written. The file stays as it was before, and the steps wait.
        """
        if not self._waiting:
            return
        data = _segment(self._header, self._steps, self._waiting)
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._fd, memoryview(data)[done:], self._end + done)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise DiskError(
                f"cannot write {self._path}: {error.strerror}. Steps from {self._steps} on wait: make room for them"
            ) from error
        self._end += len(data)
        self._steps += len(self._waiting)
        self._waiting, self._waiting_nbytes = [], 0

    def close(self) -> None:
        """Write what waits, and close the file. More than once does no harm."""
        if self._fd < 0:
            return
        try:
            self.flush()
        finally:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def encode_trace(trace: Trace, *, segment_nbytes: int = SEGMENT_NBYTES) -> Iterator[bytes]:
    """The file of a trace, segment by segment."""
    steps, nbytes, first, number = [], 0, 0, 0
    for number, step in enumerate(steps_of(trace), start=1):
        steps.append(step)
        nbytes += sum(a.nbytes for a in (step.experts, step.scores, step.guesses) if a is not None)
        if nbytes >= segment_nbytes:
            yield _segment(trace.header, first, steps)
            steps, nbytes, first = [], 0, number
    if steps or number == 0:
        yield _segment(trace.header, first, steps)


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """The trace at `path`. If its end was cut off, the steps before that; it is told in `problems`.

    Raises:
        TraceError: there is no such file, it is no trace, it is damaged, or of a newer version.
    """
    name = os.fspath(path)
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        raise TraceError(f"cannot read {name}: {error.strerror}") from error
    if not data:
        raise TraceError(f"{name} is empty: nothing was recorded into it")
    if not data.startswith(MAGIC[: len(data)]):
        raise TraceError(f"{name} is no routing trace: it does not begin with the mark of one")
    try:
        return _trace(data)
    except TraceError as error:
        raise TraceError(f"{name}: {error}") from error


def _trace(data: bytes) -> Trace:
    header: TraceHeader | None = None
    steps: list[Step] = []
    problems: tuple[str, ...] = ()
    offset = 0
    while offset < len(data):
        payload, nbytes = _payload(data, offset)
        if payload is None:
            problems = (f"the recording was cut off: the file ends within a segment, after {len(steps)} whole steps",)
            break
        if header is None:
            header = payload.header
        elif payload.header != header:
            raise TraceError(f"the segment at byte {offset} is of another trace than those before it")
        if payload.first_step != len(steps):
            raise TraceError(
                f"the segment at byte {offset} begins with step {payload.first_step} and {len(steps)} come before it: "
                "a segment is missing, or is there twice"
            )
        steps.extend(_steps(payload, offset))
        offset += nbytes
    if header is None:
        raise TraceError("the file ends within its first segment: there is nothing that could be read")
    return trace_of(header, steps, problems=problems)


def _payload(data: bytes, offset: int) -> tuple[_Payload | None, int]:
    """The segment at a place, and its length; None where the data end within it."""
    if len(data) - offset < _PREFIX.size:
        return None, 0
    magic, major, _, stored, inflated, checksum = _PREFIX.unpack_from(data, offset)
    if magic != MAGIC:
        raise TraceError(f"no segment begins at byte {offset}, where one must: the file is damaged there")
    if major > MAJOR:
        raise TraceError(f"it is of version {major}, and this penstock reads up to {MAJOR}: use a newer penstock")
    if stored > _LARGEST or inflated > min(_LARGEST, stored * _INFLATION):
        raise TraceError(f"the segment at byte {offset} claims {stored} bytes that become {inflated}: it is damaged")
    begin = offset + _PREFIX.size
    body = memoryview(data)[begin : begin + stored]
    if len(body) < stored:
        if MAGIC in bytes(body):
            raise TraceError(f"the segment at byte {offset} claims {stored} bytes, and others follow: it is damaged")
        return None, 0
    if zlib.crc32(body, zlib.crc32(data[offset : offset + _CHECKED])) != checksum:
        raise TraceError(f"the segment at byte {offset} is damaged: its checksum does not agree")
    try:
        inflater = zlib.decompressobj()
        plain = inflater.decompress(body, inflated + 1)
        payload = msgspec.msgpack.decode(plain, type=_Payload)
    except (zlib.error, msgspec.DecodeError, UsageError) as error:
        raise TraceError(f"the segment at byte {offset} cannot be decoded: {error}") from error
    if len(plain) != inflated or not inflater.eof:
        raise TraceError(f"the segment at byte {offset} inflates to another size than it says")
    return payload, _PREFIX.size + stored


def _segment(header: TraceHeader, first_step: int, steps: Iterable[Step]) -> bytes:
    part = trace_of(header, steps)
    ids = _id_type(header)
    payload = _Payload(
        header=header,
        first_step=first_step,
        phases=part.phases.tobytes(),
        lengths=tuple(np.diff(part.begins).tolist()),
        requests=part.requests.astype("<u4").tobytes(),
        experts=_packed(part.experts, ids),
        scores=None if part.scores is None else _packed(part.scores, "<f2"),
        guesses=None if part.guesses is None else _packed(part.guesses, ids),
    )
    plain = msgspec.msgpack.encode(payload)
    stored = zlib.compress(plain, _LEVEL)
    if max(len(plain), len(stored)) > _LARGEST:
        raise TraceError(f"a step of {part.tokens} tokens takes {len(plain)} bytes: a segment holds up to {_LARGEST}")
    prefix = _PREFIX.pack(MAGIC, MAJOR, MINOR, len(stored), len(plain), 0)[:_CHECKED]
    return prefix + struct.pack("<I", zlib.crc32(stored, zlib.crc32(prefix))) + stored


def _steps(payload: _Payload, offset: int) -> list[Step]:
    header = payload.header
    routing = header.routing
    tokens = sum(payload.lengths)
    if len(payload.phases) != len(payload.lengths) or any(each < 1 for each in payload.lengths):
        raise TraceError(f"the segment at byte {offset} has {len(payload.phases)} steps with lengths that cannot be")
    if payload.phases and max(payload.phases) >= len(PHASES):
        raise TraceError(f"the segment at byte {offset} has steps that are neither {' nor '.join(PHASES)}")
    ids = _id_type(header)
    requests = _array(payload.requests, "<u4", (tokens,), offset).astype(np.uint32)
    shape = (tokens, routing.layers, header.width)
    experts = _unpacked(payload.experts, ids, shape, np.uint16, offset)
    scores = None if payload.scores is None else _unpacked(payload.scores, "<f2", shape, np.float16, offset)
    guesses = None
    if payload.guesses is not None:
        guesses = _unpacked(payload.guesses, ids, (*shape[:2], routing.top_k), np.uint16, offset)
    steps, begin = [], 0
    for phase, length in zip(payload.phases, payload.lengths, strict=True):
        at = slice(begin, begin + length)
        steps.append(
            Step(
                phase=PHASES[phase],
                requests=requests[at],
                experts=experts[:, at],
                scores=None if scores is None else scores[:, at],
                guesses=None if guesses is None else guesses[:, at],
            )
        )
        begin += length
    return steps


def _id_type(header: TraceHeader) -> str:
    return "<u1" if header.routing.experts < 256 else "<u2"  # 255 experts and the number that stands for none


def _packed(array: Any, dtype: str) -> bytes:
    return bytes(np.ascontiguousarray(array.transpose(1, 0, 2)).astype(dtype).tobytes())


def _unpacked(data: bytes, dtype: str, shape: tuple[int, ...], wanted: Any, offset: int) -> Any:
    return _array(data, dtype, shape, offset).transpose(1, 0, 2).astype(wanted)


def _array(data: bytes, dtype: str, shape: tuple[int, ...], offset: int) -> Any:
    needed = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if len(data) != needed:
        raise TraceError(f"the segment at byte {offset} holds an array of {len(data)} bytes: {needed} are needed")
    return np.frombuffer(data, dtype).reshape(shape)
