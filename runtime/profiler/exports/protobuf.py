"""As much of protobuf's wire format as a trace needs: four kinds of fields."""

from __future__ import annotations

import struct

_VARINT, _FIXED64, _BYTES = 0, 1, 2
_TWO_TO_64 = 1 << 64


def integer(field: int, value: int) -> bytes:
    """A field of type int64, uint64, bool or enum."""
    return _varint(field << 3 | _VARINT) + _varint(value % _TWO_TO_64)  # negative numbers as two's complement


def fixed64(field: int, value: int) -> bytes:
    """A field of type fixed64."""
    return _varint(field << 3 | _FIXED64) + struct.pack("<Q", value)


def message(field: int, *parts: bytes) -> bytes:
    """A field that is a message, from its encoded fields."""
    body = b"".join(parts)
    return _varint(field << 3 | _BYTES) + _varint(len(body)) + body


def text(field: int, value: str) -> bytes:
    """A field of type string."""
    return message(field, value.encode(errors="replace"))


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
