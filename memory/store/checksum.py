"""The checksum of blocks and of the store's own files: xxh3 with 64 bits, faster than memory can be copied."""

from __future__ import annotations

import xxhash


def checksum(data: bytes | bytearray | memoryview) -> int:
    """The xxh3_64 of some bytes, as an unsigned number."""
    return xxhash.xxh3_64_intdigest(data)


class RunningChecksum:
    """The same for bytes that come piece by piece, in order: those of a block that is moved in chunks."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def update(self, piece: bytes | bytearray | memoryview) -> None:
        """Take in the next piece."""
        self._state.update(piece)

    def value(self) -> int:
        """The checksum of all pieces so far."""
        return self._state.intdigest()
