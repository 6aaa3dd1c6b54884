"""Where the whole blocks of a layer are, and whose they are: worked out when one comes or goes, not at each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Final

import numpy as np

from ...scheduler.kv.policies.policy import IntArray
from ...scheduler.kv.table import BlockTable
from .spread import Span, Use, spans

PIECE_NBYTES: Final = 8 * 2**20
"""Of blocks in host memory that are attended to at once, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """Of the tiers of a cache, the fastest first."""

    device: int | None
    """None where a cache has nothing on a device."""
    host: int
    disk: int
    """Of a tier that may not be there."""

    @classmethod
    def of(cls, *, device: bool) -> Numbers:
        """With a device's memory above the host's, or without."""
        return cls(device=0 if device else None, host=int(device), disk=int(device) + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Blocks in slots that follow each other."""

    first: int
    """Slot."""
    blocks: tuple[int, ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Places:
    """Where the blocks of one row are, in their order: [blocks] each."""

    blocks: IntArray
    tiers: IntArray
    """The fastest that has each of them."""
    slots: IntArray
    """In that tier."""


class Placement:
    """The whole blocks of all rows, at this moment. Beginnings of blocks are told by `BlockTable.last`.

    Args:
        table: Of a layer.
        numbers: Of its tiers.
        piece_blocks: Of a piece in host memory, at most; None for as many as are best attended to at once.
    """

    def __init__(self, table: BlockTable, numbers: Numbers, *, piece_blocks: int | None = None) -> None:
        self.uses: dict[int, list[Use]] = {}
        """Of each block."""
        self._table = table
        self._rows: list[list[int]] = [[] for _ in range(table.rows)]
        self._places: dict[int, Places] = {}
        for row in range(table.rows):
            for part in table.parts(row, 0):
                if part.tokens == table.shape.block_tokens:
                    self.uses.setdefault(part.block, []).append(Use(row=row, position=part.position))
                    self._rows[row].append(part.block)
        self._most = piece_blocks or max(1, PIECE_NBYTES // table.tiers.slot_nbytes)
        self._on_device = {} if numbers.device is None else self._slots(numbers.device)
        self._in_host = self._slots(numbers.host)
        self.on_disk = self._slots(numbers.disk)
        """Slots and blocks of what only the disk has."""
        self._disk: tuple[Piece, ...] | None = None

    @cached_property
    def host(self) -> tuple[Piece, ...]:
        """What is attended to in host memory."""
        return self.pieces(self._in_host, self._most)

    @cached_property
    def device(self) -> tuple[Piece, ...]:
        """What is attended to in a device's memory."""
        return self.pieces(self._on_device, max(1, PIECE_NBYTES // self._table.tiers.slot_nbytes))

    def disk(self, most: int) -> tuple[Piece, ...]:
        """What only the disk has, cut into runs of at most so many; always as many."""
        if self._disk is None:
            self._disk = self.pieces(self.on_disk, most)
        return self._disk

    def places(self, row: int) -> Places:
        """Where the whole blocks of a row are."""
        if row not in self._places:
            tiers = self._table.tiers
            blocks = self._rows[row]
            where = [tiers.fastest(block) for block in blocks]
            slots = [tiers.slot(block, tier) for block, tier in zip(blocks, where, strict=True)]
            assert None not in slots, row
            self._places[row] = Places(
                blocks=np.array(blocks, np.int64), tiers=np.array(where, np.int64), slots=np.array(slots, np.int64)
            )
        return self._places[row]

    def pieces(self, slots: dict[int, int], most: int) -> tuple[Piece, ...]:
        """Slots and their blocks, cut into runs of at most so many."""
        order = sorted(slots)
        breaks = [at for at, (one, two) in enumerate(pairwise(order), 1) if two != one + 1]
        made = []
        for start, stop in pairwise([0, *breaks, len(order)]):
            for at in range(start, stop, most):
                run = order[at : min(at + most, stop)]
                made.append(self.piece(run[0], tuple(slots[slot] for slot in run)))
        return tuple(made)

    def piece(self, first: int, blocks: tuple[int, ...]) -> Piece:
        """Blocks in slots that follow each other; those that are nobody's have no uses."""
        uses: list[Sequence[Use]] = [self.uses.get(block, ()) for block in blocks]
        return Piece(first=first, blocks=blocks, spans=spans(uses))

    def _slots(self, tier: int) -> dict[int, int]:
        tiers = self._table.tiers
        slots = {}
        for block in self.uses:
            if tiers.fastest(block) == tier:
                slot = tiers.slot(block, tier)
                assert slot is not None, block
                slots[slot] = block
        return slots
