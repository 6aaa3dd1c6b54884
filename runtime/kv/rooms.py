"""Where the blocks of one layer lie: slots of the host's arena, of a device's and of a file, and blocks that grow."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

import torch

from ...memory.arena import HostArena
from ...scheduler.kv.writes import Write
from .coded import CodedLayout
from .layout import BlockLayout
from .memory import KvMemory
from .placement import Numbers
from .spill import SpillFile, arrive

Room = tuple[torch.Tensor, torch.Tensor]
"""Where keys and values are: [heads, tokens, dim] each, with slots or blocks before them where there are several."""


class LayerRooms:
    """The memory of one layer, and its file.

    Args:
        number: Of the layer, among those that are kept in tiers.
        layout: Of its blocks.
        memory: Of the cache.
        numbers: Of the layer's tiers.
    """

    def __init__(self, number: int, layout: BlockLayout, memory: KvMemory, numbers: Numbers) -> None:
        self.layout = layout
        self._number = number
        self._memory = memory
        self._numbers = numbers
        unit = layout.slot_nbytes
        self._start, stop = memory.share(number)
        with torch.inference_mode(False):  # as the whole of it
            slots = memory.tensor[self._start : self._start + (stop - self._start) // unit * unit]
            self.slots = slots.view(-1, unit)
            """[slots, bytes] of host memory."""
            self.coded = layout if isinstance(layout, CodedLayout) else None
            """How full blocks are coded; None where they are not."""
            self._views = None if self.coded else (layout.keys(slots), layout.values(slots))
        """[slots, heads, tokens, dim] of host memory, where they are not coded."""
        self.host_nbytes = stop - self._start
        self._tails: dict[int, Room] = {}
        """Of coded layers, keys and values [heads, tokens, dim] of blocks that grow, by slot: those are not coded."""
        self.device_slots: torch.Tensor | None = None
        """[slots, bytes] of the device's."""
        self._device_rooms: Room | None = None
        self.device_nbytes = 0
        if memory.device is not None:
            there, end = memory.device.share(number)
            with torch.inference_mode(False):
                slots = memory.device.tensor[there : there + (end - there) // unit * unit]
                self.device_slots = slots.view(-1, unit)
                self._device_rooms = (layout.keys(slots), layout.values(slots))
            self.device_nbytes = end - there

    @cached_property
    def file(self) -> SpillFile:
        """What is on disk. It is made with the first slot that leaves.

        Raises:
            ClosedError: the cache was closed.
            DiskError: its folder cannot be made.
        """
        return SpillFile(self._memory.engine, self._memory.spill_path(self._number), self.layout.slot_nbytes)

    @property
    def home(self) -> torch.device:
        """Where tokens are written."""
        return torch.device("cpu") if self._newest is None else self._newest[0].device

    def parts(self, first: int, count: int) -> Room:
        """Keys and values in slots of host memory that follow each other: [slots, heads, tokens, dim]."""
        part = slice(first, first + count)
        if self._views is not None:
            return self._views[0][part], self._views[1][part]
        slots = self.slots[part].reshape(-1)
        return self.layout.keys(slots), self.layout.values(slots)

    def device_parts(self, first: int, count: int) -> Room:
        """The same of slots of the device."""
        assert self._device_rooms is not None, first
        part = slice(first, first + count)
        return self._device_rooms[0][part], self._device_rooms[1][part]

    def device_room(self, part: int) -> torch.Tensor:
        """Keys (0) or values (1) in all slots of the device: [slots, heads, tokens, dim]."""
        assert self._device_rooms is not None, part
        return self._device_rooms[part]

    def grown(self, tier: int, slot: int, tokens: int) -> Room | None:
        """The first tokens of a block that grows, [1, heads, tokens, dim]; None where only the disk has it."""
        if tier == self._numbers.disk:
            return None
        if tier == self._numbers.host and slot in self._tails:
            keys, values = (part[None] for part in self._tails[slot])
        else:
            keys, values = (self.device_parts if tier == self._numbers.device else self.parts)(slot, 1)
        return keys[:, :, :tokens], values[:, :, :tokens]

    def held(self, tier: int, slot: int) -> torch.Tensor | None:
        """The bytes of a slot in memory; None where the tier is the disk."""
        if tier == self._numbers.disk:
            return None
        slots = self.device_slots if tier == self._numbers.device else self.slots
        assert slots is not None, tier
        return slots[slot]

    def address(self, slot: int) -> int:
        """Where a slot begins in the arena in host memory."""
        return self._start + slot * self.layout.slot_nbytes

    def view(self, slot: int) -> memoryview:
        """A slot in host memory, for a drive.

        Raises:
            ClosedError: the cache was closed.
        """
        return self._memory.arena.view(self.address(slot), self.layout.slot_nbytes)

    def write(self, write: Write, keys: torch.Tensor, values: torch.Tensor, offset: int) -> None:
        """Put new tokens into a block that grows, behind what it goes on from.

        Args:
            write: Of which, and where.
            keys: [rows, heads, tokens, dim], of which it is a part.
            values: Likewise.
            offset: Of the tokens that it is about, among these.
        """
        if write.copied_from is not None and write.start:
            assert write.source_slot is not None
            self._copy_beginning(write, write.source_slot)
        at = offset + write.position
        for room, new in zip(self._room(write.slot, fresh=not write.start), (keys, values), strict=True):
            room[:, write.start : write.start + write.tokens] = new[write.row, :, at : at + write.tokens]

    def copy(self, write: Write, slots: torch.Tensor, offset: int) -> None:
        """Copy a whole block: the one of [blocks, slot bytes] that is `offset` tokens and the write's place behind."""
        number, start = divmod(offset + write.position, self.layout.block_tokens)
        assert start == write.start, write
        slot = slots[number]
        assert self._newest is not None, "prefixes are of blocks as they were made"
        for room, new in zip(self._newest, (self.layout.keys(slot), self.layout.values(slot)), strict=True):
            room[write.slot, :, start : start + write.tokens] = new[0, :, start : start + write.tokens]

    def seal(self, slots: Collection[int], growing: Collection[int]) -> None:
        """Code what lies in these slots and is full now; what grows stays as it is, and all else goes.

        Args:
            slots: In host memory.
            growing: Those of blocks that rows end with.
        """
        if self.coded is None:
            return
        for slot in slots:
            tail = self._tails.pop(slot, None)
            if tail is not None:  # there is none after an error, and then the cache has to be reset
                self.coded.write(self.slots[slot], *tail)
        self._tails = {slot: tail for slot, tail in self._tails.items() if slot in growing}

    @property
    def _newest(self) -> Room | None:
        """Keys and values of the tier in which blocks grow; None where they are coded when they are full."""
        return self._views if self._device_rooms is None else self._device_rooms

    def _room(self, slot: int, *, fresh: bool) -> Room:
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

    def _copy_beginning(self, write: Write, source: int) -> None:
        """What a new block begins with, from the tier that has it."""
        if self._device_rooms is not None:
            for room, before in zip(self._device_rooms, self._before(write, source), strict=True):
                room[write.slot, :, : write.start] = before[0, :, : write.start]
        elif write.source_tier == self._numbers.disk:  # all of it comes: what is beyond it is written anew
            arrive(self.file.read(source, 1, self.view(write.slot), urgent=True))
            self._put_beginning(write, write.slot)
        else:
            self._put_beginning(write, source)

    def _put_beginning(self, write: Write, source: int) -> None:
        """Copy the beginning of what a block goes on from; from the place itself only where it has to be decoded."""
        if self.coded is None and source == write.slot:
            return
        grows = self._tails.get(source) if source != write.slot else None
        before = grows if grows is not None else tuple(part[0] for part in self.parts(source, 1))
        for room, part in zip(self._room(write.slot, fresh=True), before, strict=True):
            room[:, : write.start] = part[:, : write.start]

    def _before(self, write: Write, source: int) -> Room:
        """Keys and values [1, heads, tokens, dim] of the block that one on a device goes on from, in any tier."""
        if write.source_tier == self._numbers.device:
            return self.device_parts(source, 1)
        if write.source_tier == self._numbers.host:
            return self.parts(source, 1)
        unit = self.layout.slot_nbytes
        arena = HostArena(unit)
        try:
            arrive(self.file.read(source, 1, arena.view(0, unit), urgent=True))
            slot = torch.frombuffer(arena.buffer, dtype=torch.uint8)[:unit].clone()
        finally:
            arena.close()
        return self.layout.keys(slot), self.layout.values(slot)
