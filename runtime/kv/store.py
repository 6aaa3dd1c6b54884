"""Keys and values of one layer: blocks on a device, in host memory and on disk, written at their end and nowhere else.

A block grows in the fastest of the tiers that there are. What leaves a device goes to host memory, and from there to
disk, while other layers run. So after tokens were appended, room is made for as many again, and the next call finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch

from ...memory.arena import HostArena
from ...memory.errors import DoesNotFitError
from ...scheduler.kv.moves import Move, TierStatistics
from ...scheduler.kv.orders import Cyclic, Recent
from ...scheduler.kv.table import BlockTable
from ...scheduler.kv.tiers import Tier, Tiers
from ...scheduler.kv.writes import TableStatistics, Write
from .coded import CodedLayout
from .layout import BlockLayout
from .leaving import Leaving, Moving
from .memory import KvMemory
from .placement import PIECE_NBYTES, Numbers, Piece, Placement
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
        start, stop = memory.share(number)
        self._start = start
        unit = layout.slot_nbytes
        with torch.inference_mode(False):  # as the whole of it
            slots = memory.tensor[start : start + (stop - start) // unit * unit]
            self.slots = slots.view(-1, unit)
            """[slots, bytes] of host memory."""
            self._coded = layout if isinstance(layout, CodedLayout) else None
            self._views = None if self._coded else (layout.keys(slots), layout.values(slots))
        """[slots, heads, tokens, dim] of host memory, where they are not coded."""
        self._tails: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Of coded layers, keys and values [heads, tokens, dim] of blocks that grow, by slot: those are not coded."""
        tiers = [Tier(name="host", budget_nbytes=stop - start)]
        self.device_slots: torch.Tensor | None = None
        """[slots, bytes] of the device's."""
        self._device_rooms: tuple[torch.Tensor, torch.Tensor] | None = None
        if memory.device is not None:
            there, end = memory.device.share(number)
            with torch.inference_mode(False):
                slots = memory.device.tensor[there : there + (end - there) // unit * unit]
                self.device_slots = slots.view(-1, unit)
                self._device_rooms = (layout.keys(slots), layout.values(slots))
            tiers.insert(0, Tier(name="device", budget_nbytes=end - there))
        self.numbers = Numbers.of(device=memory.device is not None)
        """Of its tiers."""
        self.piece_blocks: int | None = None
        """Of what is attended to in host memory at once, where a device takes its part of that, or it is decoded."""
        if self._coded is not None:
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
        return self._coded is not None

    @property
    def written_nbytes(self) -> int:
        """To disk, in whole slots."""
        return self._leaving.written_nbytes

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
        self._leaving.collect(wait=False)

    def placement(self) -> Placement:
        """Where all whole blocks are now; the same object until one comes or goes, and so while it is attended to."""
        if self._placement is None:
            self._placement = Placement(self.table, self.numbers, piece_blocks=self.piece_blocks)
        return self._placement

    def here(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor, tuple[Span, ...]]:
        """Keys, values [blocks, heads, tokens, dim] and users of a piece in host memory."""
        return *self.parts(piece.first, len(piece.blocks)), piece.spans

    def there(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor, tuple[Span, ...]]:
        """The same of a piece in the device's."""
        assert self._device_rooms is not None, self.number
        part = slice(piece.first, piece.first + len(piece.blocks))
        return self._device_rooms[0][part], self._device_rooms[1][part], piece.spans

    def parts(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in slots of host memory that follow each other: [slots, heads, tokens, dim]."""
        part = slice(first, first + count)
        if self._views is not None:
            return self._views[0][part], self._views[1][part]
        slots = self.slots[part].reshape(-1)
        return self.layout.keys(slots), self.layout.values(slots)

    def grown(self, part: Beginning) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values [1, heads, tokens, dim] of the end of a row; None where only the disk has it."""
        if part.tier == self.numbers.disk:
            return None
        if part.tier == self.numbers.device:
            assert self._device_rooms is not None, part
            keys, values = (room[part.slot, None, :, : part.tokens] for room in self._device_rooms)
            return keys, values
        if part.slot in self._tails:
            keys, values = self._tails[part.slot]
            return keys[None, :, : part.tokens], values[None, :, : part.tokens]
        keys, values = self.parts(part.slot, 1)
        return keys[:, :, : part.tokens], values[:, :, : part.tokens]

    def held(self, tier: int, slot: int) -> torch.Tensor | None:
        """The bytes of a slot in memory; None where the tier is the disk."""
        if tier == self.numbers.disk:
            return None
        slots = self.device_slots if tier == self.numbers.device else self.slots
        assert slots is not None, tier
        return slots[slot]

    def address(self, slot: int) -> int:
        """Where a slot begins in the arena in host memory."""
        return self._start + slot * self.layout.slot_nbytes

    @property
    def home(self) -> torch.device:
        """Where tokens are written."""
        return torch.device("cpu") if self._newest is None else self._newest[0].device

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
        """Add tokens to each row: [rows, heads, tokens, dim] where its `home` is, padding included.

        Raises:
            DoesNotFitError: no tier has room.
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
                self.used(write.block for write in writes)
            finally:
                sealed = self.table.settle(0)
                self._code(sealed)
                if sealed or any(write.copied_from is not None for write in writes):
                    self._placement = None
            done += count
        self._make_room_ahead(total)

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

    def _write(self, write: Write, keys: torch.Tensor, values: torch.Tensor, offset: int) -> None:
        if write.copied_from is not None and write.start:
            assert write.source_slot is not None
            self._copy_beginning(write, write.source_slot)
        at = offset + write.position
        for room, new in zip(self._room(write.slot, fresh=not write.start), (keys, values), strict=True):
            room[:, write.start : write.start + write.tokens] = new[write.row, :, at : at + write.tokens]

    def _put_beginning(self, write: Write, source: int) -> None:
        """Copy the beginning of what a block goes on from; from the place itself only where it has to be decoded."""
        if self._coded is None and source == write.slot:
            return
        grows = self._tails.get(source) if source != write.slot else None
        before = grows if grows is not None else tuple(part[0] for part in self.parts(source, 1))
        for room, part in zip(self._room(write.slot, fresh=True), before, strict=True):
            room[:, : write.start] = part[:, : write.start]

    def _room(self, slot: int, *, fresh: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Where keys and values of a block that grows are written: [heads, tokens, dim]."""
        newest = self._newest
        if newest is not None:
            return newest[0][slot], newest[1][slot]
        if fresh or slot not in self._tails:
            layout, shape = self.layout, (self.layout.heads, self.layout.block_tokens)
            with torch.inference_mode(False):  # as blocks in slots
                self._tails[slot] = (
                    torch.zeros(*shape, layout.key_dim, dtype=layout.dtype),
                    torch.zeros(*shape, layout.value_dim, dtype=layout.dtype),
                )
        return self._tails[slot]

    def _code(self, sealed: Sequence[int]) -> None:
        """Code blocks that are full; what grows stays as it is, and what is nobody's any more goes."""
        if self._coded is None:
            return
        for block in sealed:
            slot = self.tiers.slot(block, self.numbers.host)
            assert slot is not None, block
            tail = self._tails.pop(slot, None)
            if tail is not None:  # there is none after an error, and then the cache has to be reset
                self._coded.write(self.slots[slot], *tail)
        lasts = [self.table.last(row, 0) for row in range(self.rows)]
        alive = {self.tiers.slot(part.block, self.numbers.host) for part in lasts if part is not None}
        self._tails = {slot: tail for slot, tail in self._tails.items() if slot in alive}

    def _copy_beginning(self, write: Write, source: int) -> None:
        """What a new block begins with, from the tier that has it."""
        if self._device_rooms is not None:
            for room, before in zip(self._device_rooms, self._before(write, source), strict=True):
                room[write.slot, :, : write.start] = before[0, :, : write.start]
        elif write.source_tier == self.numbers.disk:  # all of it comes: what is beyond it is written anew
            self.file.read(source, 1, self._view(write.slot), urgent=True).wait()
            self._put_beginning(write, write.slot)
        else:
            self._put_beginning(write, source)

    def _before(self, write: Write, source: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, heads, tokens, dim] of the block that one on a device goes on from, in any tier."""
        assert self._device_rooms is not None, write
        if write.source_tier == self.numbers.device:
            return self._device_rooms[0][source, None], self._device_rooms[1][source, None]
        if write.source_tier == self.numbers.host:
            return self.parts(source, 1)
        unit = self.layout.slot_nbytes
        arena = HostArena(unit)
        try:
            self.file.read(source, 1, arena.view(0, unit), urgent=True).wait()
            slot = torch.frombuffer(arena.buffer, dtype=torch.uint8)[:unit].clone()
        finally:
            arena.close()
        return self.layout.keys(slot), self.layout.values(slot)

    @property
    def _newest(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values of the tier in which blocks grow; None where they are coded when they are full."""
        return self._views if self._device_rooms is None else self._device_rooms

    def _copy(self, write: Write, slots: torch.Tensor, offset: int) -> None:
        number, start = divmod(offset + write.position, self.layout.block_tokens)
        assert start == write.start, write
        slot = slots[number]
        assert self._newest is not None, "prefixes are of blocks as they were made"
        for room, new in zip(self._newest, (self.layout.keys(slot), self.layout.values(slot)), strict=True):
            room[write.slot, :, start : start + write.tokens] = new[0, :, start : start + write.tokens]

    def _view(self, slot: int) -> memoryview:
        return self._memory.arena.view(self.address(slot), self.layout.slot_nbytes)

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
        one = self._recent is not None or self.device_slots is not None
        tokens = min(tokens, (1 if one else AT_ONCE) * self.layout.block_tokens)
        missing = self.table.missing(0, tokens)
        if missing > self.tiers.free(0):
            with suppress(DoesNotFitError):  # who appends them will be told, or take fewer at once
                self._leaving.free(missing, ahead=True)
        if self.device_slots is not None and missing > self.tiers.free(self.numbers.host):
            with suppress(DoesNotFitError):
                self._leaving.evict(self.numbers.host, missing)

    def _begin(self, move: Move) -> Moving:
        if move.source != self.numbers.device:
            return self.file.write(move.target_slot, self._view(move.source_slot))
        assert move.target == self.numbers.host, move
        assert self.device_slots is not None
        assert self._memory.device is not None
        return self._memory.device.send(self.device_slots[move.source_slot], self.slots[move.target_slot])

    def _farness(self, block: int) -> tuple[int, ...]:
        """The first tokens are chosen in each step by all policies: their block goes last."""
        if self._recent is not None and not self.table.block(block).index:
            return (-1,)
        return self._order.farness(block)
