"""What a table tells a runtime to write, and what it may read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Write:
    """Tokens of one row that go into one block, all layers of its group alike."""

    row: int
    block: int
    slot: int
    """Of the fastest tier."""
    start: int
    """Place of the first token inside the block."""
    tokens: int
    position: int
    """Of the first token, among the positions that were appended."""
    copied_from: int | None
    """A block whose first `start` tokens are to be copied first: it is shared, or sealed."""
    source_tier: int | None
    """Where to copy them from: the fastest copy of that block, which stays where it is until `settle`."""
    source_slot: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of a row's sequence."""

    block: int
    position: int
    """Of its first token, padding counted."""
    tokens: int
    """From the start of the block; the rest of it is not this row's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableStatistics:
    """What a table holds at this moment, and what it has had written."""

    rows: int
    tokens: int
    """Of all rows in all groups, without padding: what it would hold if nothing were shared."""
    blocks: int
    sealed_blocks: int
    shared_blocks: int
    """With more than one row."""
    written_nbytes: int
    """Keys and values of appended tokens."""
    copied_nbytes: int
    """Beginnings of blocks that were copied, because they were shared or sealed."""
