"""Keys and values of one layer: blocks in host memory and on disk, written at their end and nowhere else.

What was evicted is written while other layers run. So after tokens were appended, room is made for as many again, and
the next call finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch

from ...memory.disk import Transfer
from ...memory.errors import DoesNotFitError, PenstockError
from ...scheduler.kv.moves import Move, TierStatistics
from ...scheduler.kv.orders import Cyclic
from ...scheduler.kv.table import BlockTable
from ...scheduler.kv.tiers import Tier, Tiers
from ...scheduler.kv.writes import TableStatistics, Write
from .layout import BlockLayout
from .memory import KvMemory
from .placement import DISK, HOST, Placement
from .spill import SpillFile

AT_ONCE: Final = 16
"""Blocks of each row that are appended at once, at most: what was appended can be evicted only then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """A part of a block that is the end of a row."""

    row: int
    position: int
    tokens: int
    tier: int
    slot: int


class LayerStore:
    """The keys and values of one layer.

    Args:
        number: Of the layer, among those that are kept in tiers.
        layout: Of its blocks.
        memory: Of the cache.
        paddings: Of each row: how many positions at its beginning hold nothing.

    Raises:
        DoesNotFitError: its share of host memory is too small for a block of each row.
    """

    def __init__(self, number: int, layout: BlockLayout, memory: KvMemory, paddings: Sequence[int]) -> None:
        memory.require(layout.slot_nbytes, len(paddings))
        self.number = number
        self.layout = layout
        self._memory = memory
        start, stop = memory.share(number)
        self._start = start
        unit = layout.slot_nbytes
        with torch.inference_mode(False):  # as the whole of it
            slots = memory.tensor[start : start + (stop - start) // unit * unit]
            self.slots = slots.view(-1, unit)
            """[slots, bytes] of host memory."""
            self.keys, self.values = layout.keys(slots), layout.values(slots)
        """[slots, heads, tokens, dim] of host memory."""
        tiers = [Tier(name="host", budget_nbytes=stop - start)]
        if memory.disk_share >= unit:
            tiers.append(Tier(name="disk", budget_nbytes=memory.disk_share))
        self.tiers = Tiers(tiers, unit)
        self.table = BlockTable(layout.shape, self.tiers, paddings)
        self._order = Cyclic(self.table)
        self._moving: list[tuple[Move, Transfer]] = []
        self._placement: Placement | None = None
        self.written_nbytes = 0
        """To disk, in whole slots."""

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.table.rows

    @property
    def tokens(self) -> int:
        """Positions, padding counted."""
        return self.table.positions(0)

    @cached_property
    def file(self) -> SpillFile:
        """What is on disk."""
        return SpillFile(self._memory.engine, self._memory.spill_path(self.number), self.layout.slot_nbytes)

    def collect(self) -> None:
        """Hear of what has been written meanwhile: it is on disk only from then on.

        Raises:
            DiskError: it could not be written.
        """
        self._collect(wait=False)

    def placement(self) -> Placement:
        """Where all whole blocks are now; the same object until one comes or goes, and so while it is attended to."""
        if self._placement is None:
            self._placement = Placement(self.table)
        return self._placement

    def beginnings(self) -> list[Beginning]:
        """What rows end with, where that is no whole block."""
        found = []
        for row in range(self.rows):
            part = self.table.last(row, 0)
            if part is not None:
                tier = self.tiers.fastest(part.block)
                slot = self.tiers.slot(part.block, tier)
                assert slot is not None, part
                found.append(Beginning(row=row, position=part.position, tokens=part.tokens, tier=tier, slot=slot))
        return found

    def find(self, index: int) -> tuple[int, int]:
        """The fastest tier that has a block of the first row, and its slot there."""
        block = self.table.parts(0, 0)[index].block
        tier = self.tiers.fastest(block)
        slot = self.tiers.slot(block, tier)
        assert slot is not None, index
        return tier, slot

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens to each row: [rows, heads, tokens, dim] in host memory, padding included.

        Raises:
            DoesNotFitError: neither host nor disk has room.
            DiskError: what had to leave could not be written.
        """
        self._append(keys.shape[2], lambda write, done: self._write(write, keys, values, done))

    def append_blocks(self, slots: torch.Tensor) -> None:
        """Add whole blocks to the only row, which ends with one, or is empty, and has no padding: each is copied once.

        Args:
            slots: [blocks, slot bytes] of this layout.

        Raises:
            DoesNotFitError: as `append`.
            DiskError: likewise.
        """
        size = self.layout.block_tokens
        assert self.rows == 1, self.rows
        assert not self.tokens % size, self.tokens
        self._append(slots.shape[0] * size, lambda write, done: self._copy(write, slots, done))

    def _append(self, total: int, put: Callable[[Write, int], None]) -> None:
        done = 0
        while done < total:
            count = self._make_room(min(total - done, AT_ONCE * self.layout.block_tokens))
            writes = self.table.append(0, count)
            try:
                for write in writes:
                    put(write, done)
            finally:
                if self.table.settle(0) or any(write.copied_from is not None for write in writes):
                    self._placement = None
            done += count
        self._make_room_ahead(total)

    def crop(self, tokens: int) -> None:
        """Forget all but so many positions."""
        self._collect(wait=True)
        self.table.crop(tokens)
        self._placement = None

    def reorder(self, sources: Sequence[int]) -> None:
        """Row i goes on as a copy of what row `sources[i]` is now.

        Raises:
            DoesNotFitError: there are so many rows now that their growing blocks have no room.
        """
        self._memory.require(self.layout.slot_nbytes, len(sources))
        self.table.reorder(sources)
        self._placement = None

    def close(self) -> None:
        """Give up all blocks. What is being written is waited for, and whatever becomes of it does not matter."""
        while self._moving:
            with suppress(PenstockError):
                self._finish_first()
        self.table.clear()
        self._placement = None

    def statistics(self) -> tuple[TableStatistics, tuple[TierStatistics, ...]]:
        """Frozen records of its table and tiers."""
        return self.table.statistics(), self.tiers.statistics()

    def _write(self, write: Write, keys: torch.Tensor, values: torch.Tensor, offset: int) -> None:
        if write.copied_from is not None and write.start:
            assert write.source_slot is not None
            if write.source_tier == DISK:  # all of it comes: what is beyond the beginning is written anew
                self.file.read(write.source_slot, 1, self._view(write.slot), urgent=True).wait()
            else:
                for room in (self.keys, self.values):
                    room[write.slot, :, : write.start] = room[write.source_slot, :, : write.start]
        at = offset + write.position
        for room, new in ((self.keys, keys), (self.values, values)):
            room[write.slot, :, write.start : write.start + write.tokens] = new[write.row, :, at : at + write.tokens]

    def _copy(self, write: Write, slots: torch.Tensor, offset: int) -> None:
        number, start = divmod(offset + write.position, self.layout.block_tokens)
        assert start == write.start, write
        slot = slots[number]
        for room, new in ((self.keys, self.layout.keys(slot)), (self.values, self.layout.values(slot))):
            room[write.slot, :, start : start + write.tokens] = new[0, :, start : start + write.tokens]

    def _view(self, slot: int) -> memoryview:
        unit = self.layout.slot_nbytes
        return self._memory.arena.view(self._start + slot * unit, unit)

    def _make_room(self, tokens: int) -> int:
        """Have slots for some of the tokens; returns for how many."""
        while True:
            missing = self.table.missing(0, tokens)
            if missing <= self.tiers.free(HOST):
                return tokens
            self._collect(wait=False)
            try:
                self._evict(missing)
            except DoesNotFitError:
                if self._moving:
                    self._collect(wait=True)
                elif tokens == 1:
                    raise
                else:
                    tokens = -(-tokens // 2)
                continue
            while self._moving and self.tiers.free(HOST) < missing:
                self._finish_first()

    def _make_room_ahead(self, tokens: int) -> None:
        tokens = min(tokens, AT_ONCE * self.layout.block_tokens)
        missing = self.table.missing(0, tokens)
        if missing > self.tiers.free(HOST):
            try:
                self._evict(missing)
            except DoesNotFitError:
                return  # who appends them will be told, or take fewer at once

    def _evict(self, slots: int) -> None:
        moves = list(self.tiers.make_room(HOST, slots, self._order.farness))
        self._placement = None  # clean copies may have been dropped
        while moves:
            try:
                transfer = self.file.write(moves[0].target_slot, self._view(moves[0].source_slot))
            except BaseException:
                for move in moves:
                    self.tiers.finish(move, failed=True)
                raise
            self._moving.append((moves.pop(0), transfer))

    def _collect(self, *, wait: bool) -> None:
        """Hear of what has been written; the first failure is raised, and that block stays where it was."""
        while self._moving and (wait or self._moving[0][1].done()):
            self._finish_first()

    def _finish_first(self) -> None:
        move, transfer = self._moving.pop(0)
        failed = True
        try:
            transfer.wait()
            failed = False
        finally:
            self.tiers.finish(move, failed=failed)
            self._placement = None
        self.written_nbytes += move.nbytes
