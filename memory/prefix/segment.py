"""A segment: one file with some blocks that follow each other, and what is in it at its beginning.

    | header, twice: name, parent, number of the first block; of each block key, place, checksum | block … | block … |

It is written once and never changed. Every block begins on a page and can be read past the page cache into its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from ..arena import PAGE, round_up
from ..errors import StoreDamagedError
from ..store.sealed import seal, unseal
from .identity import KEY_NBYTES

KIND: Final = b"kvsg"
HEADER_NBYTES: Final = 2 * PAGE
"""One page for each copy of it."""
MOST_BLOCKS: Final = 40
"""More would not fit the page."""
MOST_NBYTES: Final = 32 * 2**20
"""Of a segment, unless one block is larger: enough for a drive's full rate, and small enough to be given up at once."""


class BlockEntry(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A block in a segment."""

    key: bytes
    offset: int
    nbytes: int
    checksum: int


class SegmentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a segment."""

    name: str
    """Of its file: a file that was renamed is no segment any more."""
    root: bytes
    """Of its blocks' identity."""
    parent: bytes
    """Key of the block before its first one; the root for the first of all."""
    first: int
    """How many blocks are before it."""
    block_tokens: int
    blocks: tuple[BlockEntry, ...]

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return self.blocks[-1].offset + round_up(self.blocks[-1].nbytes)


def place_blocks(keys: Sequence[bytes], sizes: Sequence[int], checksums: Sequence[int]) -> tuple[BlockEntry, ...]:
    """Blocks one after another, each on a page."""
    entries = []
    at = HEADER_NBYTES
    for key, nbytes, checksum in zip(keys, sizes, checksums, strict=True):
        entries.append(BlockEntry(key=key, offset=at, nbytes=nbytes, checksum=checksum))
        at += round_up(nbytes)
    return tuple(entries)


def pack_header(record: SegmentRecord) -> bytes:
    """The beginning of the file."""
    packed = seal(KIND, msgspec.msgpack.encode(record))
    assert len(packed) == HEADER_NBYTES, len(record.blocks)
    return packed


def unpack_header(data: bytes, name: str, file_nbytes: int) -> SegmentRecord:
    """What is in the file of that name and length, from its first pages.

    Raises:
        StoreDamagedError: it is no segment, or damaged, cut off, or renamed.
        StoreVersionError: it is of another version of the format.
    """
    body = unseal(KIND, data, name).body
    try:
        record = msgspec.msgpack.decode(body, type=SegmentRecord)
    except msgspec.DecodeError as error:
        raise StoreDamagedError(
            f"{name} is whole but makes no sense: {error}; it was not written by penstock"
        ) from error
    if record.name != name:
        raise StoreDamagedError(f"{name} was written as {record.name}: it was renamed or copied")
    end = HEADER_NBYTES
    for block in record.blocks:
        if block.offset != end or block.nbytes < 1 or len(block.key) != KEY_NBYTES or not 0 <= block.checksum < 2**64:
            raise StoreDamagedError(f"{name} is whole but makes no sense: a block has an impossible place, size or key")
        end += round_up(block.nbytes)
    if not record.blocks or record.first < 0 or record.block_tokens < 1 or len(record.parent) != KEY_NBYTES:
        raise StoreDamagedError(f"{name} is whole but makes no sense: it has no blocks, or an impossible number")
    if end != file_nbytes:
        raise StoreDamagedError(f"{name} has {file_nbytes} bytes and had {end} when it was written: it was cut off")
    return record
