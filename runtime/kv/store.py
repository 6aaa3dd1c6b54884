"""Keys and values of one layer: blocks on a device, in host memory and on disk, written at their end and nowhere else.

A block grows in the fastest of the tiers that there are. What leaves a device goes to host memory, and from there to
disk, while other layers run. So after tokens were appended, room is made for as many again, and the next call finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import torch

from ...memory.errors import DoesNotFitError
from ...scheduler.kv.moves import Move, TierStatistics
from ...scheduler.kv.orders import Cyclic, Recent
from ...scheduler.kv.table import BlockTable
from ...scheduler.kv.tiers import Tier, Tiers
from ...scheduler.kv.writes import TableStatistics, Write
from .layout import BlockLayout
from .leaving import Leaving, Moving
from .memory import KvMemory
from .placement import PIECE_NBYTES, Numbers, Piece, Placement
from .rooms import LayerRooms
from .spill import SpillFile
from .spread import Span

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
        chooses: Whether a policy says in each step what is read: then nothing is read ahead, and what was chosen
            longest ago leaves host memory first.

    Raises:
        DoesNotFitError: its share of host memory, or of the device's, is too small for a block of each row.
    """

    def __init__(
        self, number: int, layout: BlockLayout, memory: KvMemory, paddings: Sequence[int], *, chooses: bool = False
    ) -> None:
        memory.require(layout.slot_nbytes, len(paddings))
        self.number = number
        self.layout = layout
        self._memory = memory
        unit = layout.slot_nbytes
        self.numbers = Numbers.of(device=memory.device is not None)
        """Of its tiers."""
        self.rooms = LayerRooms(number, layout, memory, self.numbers)
        """Of its blocks in memory."""
        tiers = [Tier(name="host", budget_nbytes=self.rooms.host_nbytes)]
        if memory.device is not None:
            tiers.insert(0, Tier(name="device", budget_nbytes=self.rooms.device_nbytes))
        self.piece_blocks: int | None = None
        """Of what is attended to in host memory at once, where a device takes its part of that, or it is decoded."""
        if self.coded:
            decoded = layout.heads * (layout.key_dim + layout.value_dim) * layout.dtype.itemsize * layout.block_tokens
            self.piece_blocks = max(1, PIECE_NBYTES // decoded)
        if memory.disk_share >= unit:
            tiers.append(Tier(name="disk", budget_nbytes=memory.disk_share))
        self.tiers = Tiers(tiers, unit)
        self.table = BlockTable(layout.shape, self.tiers, paddings)
        self._recent = Recent() if chooses else None
        self._order: Cyclic | Recent = self._recent or Cyclic(self.table)
        self._leaving = Leaving(
            self.tiers,
            self.numbers,
            spills=memory.disk_share >= unit,
            begin=self._begin,
            farness=self._farness,
            changed=self._replace,
        )
        self._placement: Placement | None = None
        self.chooses = chooses

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.table.rows

    @property
    def coded(self) -> bool:
        """Whether full blocks are coded."""
        return self.rooms.coded is not None

    @property
    def written_nbytes(self) -> int:
        """To disk, in whole slots."""
        return self._leaving.written_nbytes

    @property
    def tokens(self) -> int:
        """Positions, padding counted."""
        return self.table.positions(0)

    @property
    def file(self) -> SpillFile:
        """What is on disk."""
        return self.rooms.file

    def collect(self) -> None:
        """Hear of what has been written meanwhile: it is on disk only from then on.

        Raises:
            DiskError: it could not be written.
        """
        self._leaving.collect(wait=False)

    def placement(self) -> Placement:
        """Where all whole blocks are now; the same object until one comes or goes, and so while it is attended to."""
        if self._placement is None:
            self._placement = Placement(self.table, self.numbers, piece_blocks=self.piece_blocks)
        return self._placement

    def here(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor, tuple[Span, ...]]:
        """Keys, values [blocks, heads, tokens, dim] and users of a piece in host memory."""
        return *self.rooms.parts(piece.first, len(piece.blocks)), piece.spans

    def there(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor, tuple[Span, ...]]:
        """The same of a piece in the device's."""
        return *self.rooms.device_parts(piece.first, len(piece.blocks)), piece.spans

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
        """Add tokens to each row: [rows, heads, tokens, dim] where the `rooms` are at home, padding included.

        Rows of a prompt that were the same before, and get the same, are stored once: those of beams, and of several
        answers to a prompt, are the same row again and again.

        Raises:
            DoesNotFitError: no tier has room.
            DiskError: what had to leave could not be written.
        """
        sources = self._alike(keys, values)
        firsts = sorted(set(sources))
        if len(firsts) == len(sources):
            self._append(keys.shape[2], lambda write, done: self.rooms.write(write, keys, values, done))
            return
        keys, values = keys[firsts], values[firsts]
        self.table.reorder(firsts)
        try:
            self._append(keys.shape[2], lambda write, done: self.rooms.write(write, keys, values, done))
        finally:
            self.reorder([firsts.index(source) for source in sources])

    def _alike(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[int]:
        """For each row the first one that it is a copy of, with what it gets. Not asked of single tokens, in which rows
        part, nor of a GPU, which would have to be waited for."""
        if self.rows == 1 or keys.shape[2] == 1 or keys.device.type != "cpu":
            return range(self.rows)
        before = self.table.alike()
        found: list[int] = []
        for row in range(self.rows):
            same = (
                one
                for one in sorted(set(found))
                if before[one] == before[row]
                and torch.equal(keys[one], keys[row])
                and torch.equal(values[one], values[row])
            )
            found.append(next(same, row))
        return found

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
        self._append(slots.shape[0] * size, lambda write, done: self.rooms.copy(write, slots, done))

    def _append(self, total: int, put: Callable[[Write, int], None]) -> None:
        done = 0
        while done < total:
            count = self._make_room(min(total - done, AT_ONCE * self.layout.block_tokens))
            writes = self.table.append(0, count)
            try:
                for write in writes:
                    put(write, done)
                self.used(write.block for write in writes)
            finally:
                sealed = self.table.settle(0)
                self._seal(sealed)
                if sealed or any(write.copied_from is not None for write in writes):
                    self._placement = None
            done += count
        self._make_room_ahead(total)

    def sent(self, nbytes: int) -> None:
        """So much was brought from the device for who looks at it on the host."""
        assert self._memory.device is not None
        self._memory.device.sent_nbytes += nbytes

    def used(self, blocks: Iterable[int]) -> None:
        """These blocks were written, or chosen."""
        if self._recent is not None:
            for block in blocks:
                self._recent.used(block)

    def crop(self, tokens: int) -> None:
        """Forget all but so many positions."""
        self._leaving.collect(wait=True)
        self.table.crop(tokens)
        self._forget_places()

    def reorder(self, sources: Sequence[int]) -> None:
        """Row i goes on as a copy of what row `sources[i]` is now.

        Raises:
            DoesNotFitError: there are so many rows now that their growing blocks have no room.
        """
        self._memory.require(self.layout.slot_nbytes, len(sources))
        self.table.reorder(sources)
        self._forget_places()

    def close(self) -> None:
        """Give up all blocks. What is being written is waited for, and whatever becomes of it does not matter."""
        self._leaving.abandon()
        self.table.clear()
        self._placement = None

    def statistics(self) -> tuple[TableStatistics, tuple[TierStatistics, ...]]:
        """Frozen records of its table and tiers."""
        return self.table.statistics(), self.tiers.statistics()

    def _replace(self) -> None:
        """Blocks have come or gone."""
        self._placement = None

    def _forget_places(self) -> None:
        self._placement = None
        if self._recent is not None:
            self._recent.forget(self.table.has)

    def _seal(self, blocks: Sequence[int]) -> None:
        """Have blocks coded that are full, where they are to be."""
        if not self.coded:
            return
        full = [self.tiers.slot(block, self.numbers.host) for block in blocks]
        lasts = [self.table.last(row, 0) for row in range(self.rows)]
        growing = [self.tiers.slot(part.block, self.numbers.host) for part in lasts if part is not None]
        assert None not in full, blocks
        self.rooms.seal([slot for slot in full if slot is not None], {slot for slot in growing if slot is not None})

    def _make_room(self, tokens: int) -> int:
        """Have slots for some of the tokens; returns for how many."""
        while True:
            missing = self.table.missing(0, tokens)
            if missing <= self.tiers.free(0):
                return tokens
            self._leaving.collect(wait=False)
            try:
                self._leaving.free(missing)
            except DoesNotFitError:
                if self._leaving.under_way:
                    self._leaving.collect(wait=True)
                elif tokens == 1:
                    raise
                else:
                    tokens = -(-tokens // 2)
                continue
            self._leaving.wait_for(0, missing)

    def _make_room_ahead(self, tokens: int) -> None:
        # After a prompt tokens come one by one. A policy wants the last ones, and what left a device does not come
        # back: they do not leave for a next chunk.
        one = self._recent is not None or self.numbers.device is not None
        tokens = min(tokens, (1 if one else AT_ONCE) * self.layout.block_tokens)
        missing = self.table.missing(0, tokens)
        if missing > self.tiers.free(0):
            with suppress(DoesNotFitError):  # who appends them will be told, or take fewer at once
                self._leaving.free(missing, ahead=True)
        if self.numbers.device is not None and missing > self.tiers.free(self.numbers.host):
            with suppress(DoesNotFitError):
                self._leaving.evict(self.numbers.host, missing)

    def _begin(self, move: Move) -> Moving:
        if move.source != self.numbers.device:
            return self.file.write(move.target_slot, self.rooms.view(move.source_slot))
        assert move.target == self.numbers.host, move
        source = self.rooms.held(move.source, move.source_slot)
        assert source is not None
        assert self._memory.device is not None
        return self._memory.device.send(source, self.rooms.slots[move.target_slot])

    def _farness(self, block: int) -> tuple[int, ...]:
        """The first tokens are chosen in each step by all policies: their block goes last."""
        if self._recent is not None and not self.table.block(block).index:
            return (-1,)
        return self._order.farness(block)
