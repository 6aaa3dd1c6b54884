"""Slots that really hold something, so that tests see what a table and its tiers make of it."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.scheduler.kv.moves import Move
from penstock.scheduler.kv.table import BlockTable
from penstock.scheduler.kv.writes import Write

Token = tuple[int, ...]
"""Something that no other token is."""


class Memory:
    """What each slot of each tier holds. Moves are carried out when they are finished, and not before."""

    def __init__(self, table: BlockTable) -> None:
        self.table = table
        self.slots: dict[tuple[int, int], list[Token]] = {}
        self.moved = 0

    def write(self, writes: Sequence[Write], values: Sequence[Sequence[Token]]) -> None:
        """`values`: by row, the positions that were appended. Copies come first, as a runtime has it."""
        for write in writes:
            before: list[Token] = []
            if write.copied_from is not None:
                before = self.source(write)
                assert len(before) == write.start
                self.slots[0, write.slot] = before
            held = self.slots.setdefault((0, write.slot), [])
            if write.start == 0:
                held.clear()
            del held[write.start :]
            held.extend(values[write.row][write.position : write.position + write.tokens])

    def source(self, write: Write) -> list[Token]:
        """What is there of what a write copies."""
        assert write.source_tier is not None
        assert write.source_slot is not None
        return self.slots[write.source_tier, write.source_slot][: write.start]

    def finish(self, move: Move, *, failed: bool) -> None:
        if not failed:
            self.slots[move.target, move.target_slot] = list(self.slots[move.source, move.source_slot])
            self.moved += move.nbytes
        self.table.tiers.finish(move, failed=failed)

    def read(self, row: int, group: int) -> list[Token]:
        """A row's tokens, from the slowest tier that has each block: all copies must be good."""
        found: list[Token] = []
        for part in self.table.parts(row, group):
            copies = [(t, s) for t in range(3) if (s := self._slot(part.block, t)) is not None]
            contents = [self.slots[copy][: part.tokens] for copy in copies]
            assert contents, part
            assert all(content == contents[0] for content in contents), part
            assert part.position == self.table.padding(row) + len(found)
            found += contents[0]
        return found

    def _slot(self, block: int, tier: int) -> int | None:
        return self.table.tiers.slot(block, tier) if tier < len(self.table.tiers.statistics()) else None
