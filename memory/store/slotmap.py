"""Where every slot of a store lies. Fixed when the store is made; plain arithmetic, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..arena import PAGE, round_up
from ..errors import UsageError
from ..layout import FileSpan

SLOTS: Final = 2
"""Per block: one holds what is committed while the other takes what is written after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpec:
    """A block that a store is to hold. Its id is its place in the list."""

    name: str
    """Unique in the store."""
    kind: str
    """What the block is to the caller: "weights", "optimizer", …"""
    nbytes: int
    """Payload in bytes, at least 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Home:
    """Where the two slots of a block lie: one after the other, in one file."""

    drive: int
    offset: int
    """Of the first slot, in bytes; a multiple of the page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotMap:
    """The blocks of a store and their places."""

    blocks: tuple[BlockSpec, ...]
    homes: tuple[Home, ...]
    """One per block."""
    paths: tuple[str, ...]
    """The data file of each drive."""

    def span(self, block: int, slot: int) -> FileSpan:
        """The payload in a slot. The slot itself is longer: up to the end of the last page."""
        home, nbytes = self.homes[block], self.blocks[block].nbytes
        offset = home.offset + slot * round_up(nbytes)
        return FileSpan(path=self.paths[home.drive], offset=offset, nbytes=nbytes)

    def drive_nbytes(self) -> tuple[int, ...]:
        """Length of each drive's data file."""
        totals = [0] * len(self.paths)
        for home, block in zip(self.homes, self.blocks, strict=True):
            totals[home.drive] = max(totals[home.drive], home.offset + SLOTS * round_up(block.nbytes))
        return tuple(totals)

    def label(self, block: int) -> str:
        """How messages name a block."""
        spec = self.blocks[block]
        return f"block {block} ({spec.kind} {spec.name!r})"


def check_blocks(blocks: Sequence[BlockSpec]) -> None:
    """Refuse what cannot be stored.

    Raises:
        UsageError: there is no block, an empty one, or a name twice.
    """
    if not blocks:
        raise UsageError("a block store needs at least one block; none was given")
    seen: dict[str, int] = {}
    for number, block in enumerate(blocks):
        if block.nbytes < 1:
            raise UsageError(f"block {number} ({block.name!r}) has {block.nbytes} bytes; a block has at least 1")
        first = seen.setdefault(block.name, number)
        if first != number:
            raise UsageError(f"blocks {first} and {number} are both named {block.name!r}; names must differ")


def spread(blocks: Sequence[BlockSpec], drives: int) -> tuple[Home, ...]:
    """Share blocks out over drives so that each gets about as many bytes: the largest first, to the emptiest.

    On one drive they lie in the order of their ids, since that is about the order of their use.
    """
    filled = [0] * drives
    chosen = [0] * len(blocks)
    for block in sorted(range(len(blocks)), key=lambda block: (-blocks[block].nbytes, block)):
        drive = min(range(drives), key=lambda drive: (filled[drive], drive))
        chosen[block] = drive
        filled[drive] += SLOTS * round_up(blocks[block].nbytes)
    ends = [0] * drives
    homes: list[Home] = []
    for drive, block_spec in zip(chosen, blocks, strict=True):
        homes.append(Home(drive=drive, offset=ends[drive]))
        ends[drive] += SLOTS * round_up(block_spec.nbytes)
    assert all(home.offset % PAGE == 0 for home in homes)
    return tuple(homes)
