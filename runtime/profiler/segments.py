"""One segment of a profile's file: what was recorded in about a second, readable without any other segment.

    magic (8) · major (2) · minor (2) · stored bytes (4) · bytes when inflated (4) · CRC-32 (4) · payload

All numbers are little-endian. The checksum covers the fields before it and the payload. The payload is msgpack,
deflated: header, footer, the rows that the records point at, and one packed array per field and kind of record. Magic
and major version stay where they are in every version to come.

Each array is stored in the narrowest of three ways: as numbers from a base on, as steps from one record to the next, or
relative to the record's own time. Numbers take as few bytes as the largest needs, and the bytes lie in planes (all
lowest bytes, then all second ones, …): planes of times deflate well, rows of them do not.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from ...memory.errors import ProfileError
from .profile import Column, Columns
from .schema import MAJOR, MINOR, NONE, RECORDS, Block, Footer, Header, Module, Record, Storage, Tables, fields_of

MAGIC: Final = b"\x89Penstk\n"
"""Not text, and changed by whatever changes line ends."""
LIMIT_NBYTES: Final = 2**30
"""What a segment may take: in the file, inflated, and as arrays."""
PREFIX: Final = struct.Struct("<8sHHIII")
_CHECKED: Final = PREFIX.size - 4
"""Bytes of the prefix before its checksum."""
_LEVEL: Final = 1
_INFLATION: Final = 1032
"""Deflate makes nothing smaller than to 1 in 1032: what claims more is damaged or hostile."""

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What one segment says."""

    header: Header
    footer: Footer
    columns: Mapping[type[Record], Columns] = field(default_factory=dict)
    """Only kinds of which there are records."""
    tables: Tables = field(default_factory=dict)
    """At least the rows that the columns point at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The fixed part in front of a segment's payload."""

    major: int
    minor: int
    stored_nbytes: int
    inflated_nbytes: int
    checksum: int

    @property
    def nbytes(self) -> int:
        """Of the whole segment."""
        return PREFIX.size + self.stored_nbytes

    @staticmethod
    def of(data: bytes) -> Frame | None:
        """The frame that `data` begins with; None where it begins with something else or ends within the frame."""
        if len(data) < PREFIX.size or not data.startswith(MAGIC):
            return None
        _, major, minor, stored, inflated, checksum = PREFIX.unpack_from(data)
        return Frame(major=major, minor=minor, stored_nbytes=stored, inflated_nbytes=inflated, checksum=checksum)

    @property
    def plausible(self) -> bool:
        """Whether its lengths can be those of a segment: looked at before anything of that size is read."""
        return (
            self.stored_nbytes <= LIMIT_NBYTES
            and self.inflated_nbytes <= LIMIT_NBYTES
            and self.inflated_nbytes <= self.stored_nbytes * _INFLATION
        )


class _Way(IntEnum):
    """How an array is stored."""

    FROM_BASE = 0
    STEPS = 1
    FROM_TIME = 2


class _Packed(msgspec.Struct, frozen=True, array_like=True):
    """One array: (number − base) in planes of bytes, where a number is an element, a step, or a distance."""

    way: int
    first: int
    """The first element, of steps."""
    base: int
    width: int
    """Bytes per number: 0 where all are `base`."""
    planes: bytes


class _Kind(msgspec.Struct, frozen=True):
    """All records of one kind."""

    count: int
    fields: dict[str, _Packed]


class _Payload(msgspec.Struct, frozen=True, kw_only=True):
    """The inflated part. Fields that a newer minor version adds are passed over."""

    header: Header
    footer: Footer
    columns: dict[str, _Kind]
    modules: dict[int, Module] = {}
    blocks: dict[int, Block] = {}
    storages: dict[int, Storage] = {}
    strings: dict[int, str] = {}


_TABLES: Final = ("modules", "blocks", "storages", "strings")
_DECODER: Final = msgspec.msgpack.Decoder(_Payload)


def time_field(kind: type[Record]) -> str:
    """The column that tells when a record happened, or began: the one that profiles are sorted by."""
    return next(name for name in ("start", "needed", "at") if name in fields_of(kind))


def rows_used(columns: Mapping[type[Record], Columns], tables: Tables) -> Tables:
    """The rows that these records point at, with those that these rows point at. Numbers without a row are left out."""

    def rows(table: str, numbers: Iterator[int]) -> dict[int, Any]:
        there = tables.get(table, {})
        return {number: there[number] for number in sorted(set(numbers)) if number in there}

    blocks = rows("blocks", _pointed_at(columns, "block"))
    storages = rows("storages", _pointed_at(columns, "storage"))
    wanted = {*_pointed_at(columns, "module"), *(row.module for row in (*blocks.values(), *storages.values()))}
    return {
        "modules": _with_parents(wanted, tables.get("modules", {})),
        "blocks": blocks,
        "storages": storages,
        "strings": rows("strings", _pointed_at(columns, "string")),
    }


def encode(segment: Segment) -> bytes:
    """A segment as it stands in a file.

    Raises:
        ProfileError: it would take more than a segment may.
    """
    payload = msgspec.msgpack.encode(
        _Payload(
            header=segment.header,
            footer=segment.footer,
            columns={kind.__name__: _pack_kind(c) for kind, c in segment.columns.items() if len(c)},
            **{name: segment.tables.get(name, {}) for name in _TABLES},
        )
    )
    stored = zlib.compress(payload, _LEVEL)
    if max(len(payload), len(stored)) > LIMIT_NBYTES:
        raise ProfileError(
            f"a segment of {len(payload)} bytes is too large for a profile, which takes {LIMIT_NBYTES}: "
            "write fewer records at a time"
        )
    prefix = PREFIX.pack(MAGIC, MAJOR, MINOR, len(stored), len(payload), 0)
    return prefix[:_CHECKED] + struct.pack("<I", _checksum(prefix, stored)) + stored


def decode(data: bytes) -> Segment:
    """The segment that `data` is, prefix and payload. All kinds of records are there, those without any too.

    Raises:
        ProfileError: it is none, is damaged, or is of a newer major version. The message fits behind a colon.
    """
    frame = Frame.of(data)
    if frame is None:
        raise ProfileError("it does not begin as a segment does")
    if not frame.plausible or frame.nbytes != len(data):
        raise ProfileError(f"it claims {frame.nbytes} bytes and has {len(data)}")
    if _checksum(data, memoryview(data)[PREFIX.size :]) != frame.checksum:
        raise ProfileError("its checksum does not match its bytes")
    if frame.major > MAJOR:
        raise ProfileError(newer(frame))
    try:
        payload = _DECODER.decode(_inflated(data, frame.inflated_nbytes))
        columns = _unpacked(payload.columns)
    except (zlib.error, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProfileError(f"its contents cannot be read ({error})") from error
    return Segment(
        header=payload.header,
        footer=payload.footer,
        columns=columns,
        tables={name: getattr(payload, name) for name in _TABLES},
    )


def newer(frame: Frame) -> str:
    """What to tell somebody whose file is of a newer major version."""
    return (
        f"it has version {frame.major}.{frame.minor} of the format, and this penstock reads up to {MAJOR}.x: "
        "read it with the penstock that wrote it, or a newer one"
    )


def _checksum(prefix: bytes, stored: bytes | memoryview) -> int:
    return zlib.crc32(stored, zlib.crc32(prefix[:_CHECKED]))


def _inflated(data: bytes, nbytes: int) -> bytes:
    inflater = zlib.decompressobj()
    # One byte more than there may be, so that too many are noticed; and 0 would stand for no limit.
    found = inflater.decompress(memoryview(data)[PREFIX.size :], nbytes + 1)
    if len(found) != nbytes or not inflater.eof or inflater.unused_data:
        raise ValueError(f"{nbytes} bytes were promised, and {len(found)} or more are there")
    return found


def _pointed_at(columns: Mapping[type[Record], Columns], table: str) -> Iterator[int]:
    for kind, found in columns.items():
        for name in fields_of(kind):
            # A step's phase is a string; a computation's is a member of `Phase`.
            is_string = (kind.__name__, name) in (("Step", "phase"), ("Mark", "text"))
            if ("string" if is_string else name) == table:
                yield from np.unique(getattr(found, name)).tolist()


def _with_parents(numbers: set[int], modules: Mapping[int, Module]) -> dict[int, Module]:
    found: dict[int, Module] = {}
    for number in sorted(numbers):
        while number in modules and number not in found:
            found[number] = modules[number]
            number = found[number].parent
    return found


def _pack_kind(columns: Columns) -> _Kind:
    times: Words = getattr(columns, time_field(columns.record)).view(np.uint64)
    packed = {}
    for name in fields_of(columns.record):
        column: Column = getattr(columns, name)
        packed[name] = _pack(column, times, timed=name != time_field(columns.record))
    return _Kind(count=len(columns), fields=packed)


def _pack(column: Column, times: Words, *, timed: bool) -> _Packed:
    """The narrowest way. All differences are taken modulo 2^64, so that no number is too large for them."""
    words: Words = np.ascontiguousarray(column).view(np.uint64)
    ways = {_Way.FROM_BASE: words}
    if len(words) > 1:
        ways[_Way.STEPS] = words[1:] - words[:-1]
    if timed:
        ways[_Way.FROM_TIME] = words - times
    spans = {way: _span(numbers) for way, numbers in ways.items()}
    way = min(ways, key=lambda way: spans[way][1])
    base, span = spans[way]
    width = (span.bit_length() + 7) // 8
    above = ways[way] - np.uint64(base % 2**64)
    planes = above.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].T.tobytes()
    return _Packed(way, int(column[0]), base, width, planes)


def _span(words: Words) -> tuple[int, int]:
    numbers = words.view(np.int64)
    least = int(numbers.min())
    return least, int(numbers.max()) - least


def _unpacked(kinds: Mapping[str, _Kind]) -> dict[type[Record], Columns]:
    taken = 0
    found = {}
    for kind in RECORDS:
        kept = kinds.get(kind.__name__, _Kind(0, {}))
        taken += kept.count * len(fields_of(kind)) * 8
        if kept.count < 0 or taken > LIMIT_NBYTES:
            raise ValueError(f"{kept.count} records of kind {kind.__name__} are more than a segment holds")
        found[kind] = _unpack_kind(kind, kept)
    return found


def _unpack_kind(kind: type[Record], kept: _Kind) -> Columns:
    nothing = np.zeros(kept.count, dtype=np.uint64)
    timed = kept.fields.get(time_field(kind))
    times = nothing if timed is None else _unpack(timed, kept.count, nothing)
    arrays = {}
    for name in fields_of(kind):
        packed = kept.fields.get(name)
        if packed is None:  # an older minor version had no such field
            arrays[name] = np.full(kept.count, NONE, dtype=np.int64)
        else:
            arrays[name] = (times if packed is timed else _unpack(packed, kept.count, times)).view(np.int64)
    return Columns(kind, arrays)


def _unpack(packed: _Packed, count: int, times: Words) -> Words:
    way = _Way(packed.way)
    rows = max(count - 1, 0) if way is _Way.STEPS else count
    if not 0 <= packed.width <= 8 or len(packed.planes) != rows * packed.width:
        raise ValueError(f"an array of {rows} numbers takes {rows} × {packed.width} bytes, not {len(packed.planes)}")
    above = np.zeros((rows, 8), dtype=np.uint8)
    above[:, : packed.width] = np.frombuffer(packed.planes, dtype=np.uint8).reshape(packed.width, rows).T
    numbers: Words = above.view("<u8").reshape(rows).astype(np.uint64, copy=False)
    numbers += np.uint64(packed.base % 2**64)
    if way is _Way.FROM_TIME:
        numbers += times
    if way is not _Way.STEPS:
        return numbers
    elements = np.empty(count, dtype=np.uint64)
    elements[:1] = packed.first % 2**64
    np.cumsum(numbers, out=elements[1:])
    elements[1:] += np.uint64(packed.first % 2**64)
    return elements
