"""Sealed files: a small document kept twice in one file, each copy with its own checksum.

A manifest decides what a whole run is worth, and a page that the drive lost must not take the run with it. Both copies
are written and published at once, so this costs no more requests than one copy would.

    | magic 8 | kind 4 | version 4 | nbytes 8 | checksum 8 | body … | zeros to the page | the same again |
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from ..arena import round_up
from ..errors import StoreDamagedError, StoreVersionError, UsageError
from .checksum import checksum

FORMAT_VERSION: Final = 1
"""Of label and manifest together. The header itself never changes, so that any version can be told."""
MOST_NBYTES: Final = 2**30
"""No manifest is longer: what claims to be is not read into memory."""

_MAGIC: Final = b"penstock"
_FIELDS: Final = struct.Struct("<8s4sIQ")
_HEADER_NBYTES: Final = _FIELDS.size + 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Sealed:
    """What a sealed file holds."""

    body: bytes
    good_copies: int
    """2, or 1 when the other copy is damaged."""


def seal(kind: bytes, body: bytes, version: int = FORMAT_VERSION) -> bytes:
    """The bytes of a file that holds `body` twice. `kind` is four bytes that say what it is.

    Raises:
        UsageError: the document is too long to be read again.
    """
    assert len(kind) == 4, kind
    fields = _FIELDS.pack(_MAGIC, kind, version, len(body))
    copy = fields + checksum(fields + body).to_bytes(8, "little") + body
    nbytes = 2 * round_up(len(copy))
    if nbytes > MOST_NBYTES:
        raise UsageError(
            f"a manifest of {nbytes} bytes is too long: it may have {MOST_NBYTES}; give the store less metadata"
        )
    return copy.ljust(nbytes // 2, b"\0") * 2


def unseal(kind: bytes, data: bytes, path: str) -> Sealed:
    """The document in a file of this kind.

    Raises:
        StoreDamagedError: no copy is whole.
        StoreVersionError: it is whole, and of another version of the format.
    """
    half = len(data) // 2
    found = [body for start in (0, half) if (body := _copy(kind, data[start : start + half], path)) is not None]
    if not found:
        raise StoreDamagedError(
            f"{path} is damaged: neither of the two copies that it holds has the checksum it should have"
        )
    return Sealed(body=found[0], good_copies=len(found))


def _copy(kind: bytes, data: bytes, path: str) -> bytes | None:
    if len(data) < _HEADER_NBYTES:
        return None
    magic, found_kind, version, nbytes = _FIELDS.unpack_from(data)
    body = data[_HEADER_NBYTES : _HEADER_NBYTES + nbytes]
    expected = int.from_bytes(data[_FIELDS.size : _HEADER_NBYTES], "little")
    if (magic, found_kind, len(body)) != (_MAGIC, kind, nbytes):
        return None
    if checksum(data[: _FIELDS.size] + body) != expected:
        return None
    if version != FORMAT_VERSION:
        other = "newer" if version > FORMAT_VERSION else "older"
        raise StoreVersionError(
            f"{path} is of version {version} of the store's format; this penstock reads version {FORMAT_VERSION}: "
            f"use the {other} penstock that wrote it, or export from there and import here"
        )
    return body
