"""What is on disk, on its way to attention: runs of blocks in a ring of buffers, read ahead of who attends to them.

Layers attend in turn, for ever, so after a layer's runs come those of the next one, across the end of a token. A run
holds its buffer until it was attended to; then the next read begins. So the drive rests only while all buffers are
full, which is when attention is what binds.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ...memory.arena import debug_enabled
from ...memory.errors import PenstockError
from ...memory.transfer import Transfer
from .memory import RUN_NBYTES, RUNS, KvMemory
from .placement import Piece, Placement
from .spill import arrive
from .store import LayerStore


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Run:
    """Blocks of a layer that are read together."""

    store: LayerStore
    placement: Placement
    """As it was when they were asked for."""
    piece: Piece
    buffer: int
    transfer: Transfer


class ReadAhead:
    """The ring of one cache. Used by the thread that attends.

    Args:
        memory: Of the cache.
        slot_nbytes: Of the largest block: a run is one, at least.
    """

    def __init__(self, memory: KvMemory, slot_nbytes: int) -> None:
        ring = memory.budget.ring_nbytes
        assert ring >= RUNS * slot_nbytes, (ring, slot_nbytes)
        self._memory = memory
        self._tensor = memory.tensor
        """Its own: who attends while the cache is closed by another thread has bytes to the end of the piece."""
        # Small rings are cut into more pieces than the least: a run that is attended to delays nobody then.
        self._size = max(slot_nbytes, min(RUN_NBYTES, ring // (2 * RUNS)) // slot_nbytes * slot_nbytes)
        self._free = list(range(ring // self._size))
        self._runs: deque[Run] = deque()
        """In the order in which they were asked for."""
        self.read_nbytes = 0

    def blocks(
        self, stores: Sequence[LayerStore], at: int, *, ahead: bool = True
    ) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Ask for what a layer has on disk only, and for what the next ones have, as far as buffers reach.

        Args:
            stores: Of all layers, in their order.
            at: Number of the layer.
            ahead: Whether to ask for what the next ones have.

        Returns:
            Pieces, and their bytes, which are good until the next one is asked for.

        Raises:
            DiskError: it could not be read, or asked for.
        """
        store = stores[at]
        placement = store.placement()
        mine = self._wanted(store, placement)
        waiting = deque(self._not_asked(store, placement, tuple(mine)))
        reads = _Reads(store=store, placement=placement, mine=mine, waiting=waiting, ahead=ahead)
        self._ask_more(reads, stores, at)
        return self._arriving(reads, stores, at)

    def some(self, store: LayerStore, wanted: dict[int, int]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Read these slots of a layer, and no others: those that follow each other together.

        Args:
            store: Of the layer.
            wanted: Slots on disk and their blocks.

        Returns:
            Pieces, and their bytes, which are good until the next one is asked for.

        Raises:
            DiskError: they could not be read, or asked for.
        """
        for run in [run for run in self._runs if run.store is store]:
            self._drop(run)
        placement = store.placement()
        waiting = deque(placement.pieces(wanted, self._size // store.layout.slot_nbytes))
        reads = _Reads(store=store, placement=placement, mine=deque(), waiting=waiting, ahead=False)
        return self._arriving(reads, (), 0)

    def _arriving(self, reads: _Reads, stores: Sequence[LayerStore], at: int) -> Iterator[tuple[Piece, torch.Tensor]]:
        while reads.mine or reads.waiting:
            self._ask_more(reads, stores, at)
            run = reads.mine.popleft()
            try:
                arrive(run.transfer)
                piece = run.piece
                if run.placement is not reads.placement:
                    piece = reads.placement.piece(piece.first, _still(run, reads.placement))
                start = run.buffer * self._size
                nbytes = len(piece.blocks) * reads.store.layout.slot_nbytes
                yield piece, self._tensor[start : start + nbytes]
            finally:
                self._give(run)
        self._ask_more(reads, stores, at)

    def _ask_more(self, reads: _Reads, stores: Sequence[LayerStore], at: int) -> None:
        while reads.waiting and self._have_buffer(reads.store):
            reads.mine.append(self._ask(reads.store, reads.placement, reads.waiting.popleft(), urgent=True))
        if reads.ahead and not reads.waiting:
            self._look_ahead(stores, at)

    def block(self, store: LayerStore, slot: int) -> torch.Tensor:
        """The bytes of one slot, good until anything else is asked for."""
        if not self._have_buffer(store):
            self._drop(self._runs[-1])
        start = self._free[-1] * self._size
        unit = store.layout.slot_nbytes
        arrive(store.file.read(slot, 1, self._memory.arena.view(start, unit), urgent=True))
        self.read_nbytes += unit
        return self._tensor[start : start + unit]

    def forget(self) -> None:
        """Drop all that was read ahead: blocks have gone, and slots may get others."""
        while self._runs:
            self._drop(self._runs[-1])

    def _wanted(self, store: LayerStore, placement: Placement) -> deque[Run]:
        """Runs of a layer that were read ahead and are still of use. The others give up their buffers."""
        mine: deque[Run] = deque()
        for run in [run for run in self._runs if run.store is store]:
            if any(placement.on_disk.get(slot) == block for slot, block in _slots_of(run.piece)):
                mine.append(run)
            else:
                self._drop(run)
        return mine

    def _not_asked(self, store: LayerStore, placement: Placement, mine: Sequence[Run]) -> Iterator[Piece]:
        """What a layer wants and is not on its way: the usual runs, or what is left of them."""
        pieces = placement.disk(self._size // store.layout.slot_nbytes)
        if all(run.placement is placement for run in mine):
            firsts = {run.piece.first for run in mine}
            return (piece for piece in pieces if piece.first not in firsts)
        asked = {(run.piece.first, run.piece.blocks) for run in mine}
        if asked <= {(piece.first, piece.blocks) for piece in pieces}:
            return (piece for piece in pieces if (piece.first, piece.blocks) not in asked)
        missing = dict(placement.on_disk)  # runs were cut otherwise when they were asked for
        for run in mine:
            for slot, block in _slots_of(run.piece):
                if missing.get(slot) == block:
                    del missing[slot]
        return iter(placement.pieces(missing, self._size // store.layout.slot_nbytes))

    def _look_ahead(self, stores: Sequence[LayerStore], at: int) -> None:
        """Ask for runs of the layers after this one, until buffers are gone or all of them are on their way.

        Half of the ring is left to layers in between that choose, whose reads would wait for each other else.
        """
        left = 0
        for step in range(1, len(stores)):
            store = stores[(at + step) % len(stores)]
            if store.chooses:
                left = (len(self._free) + len(self._runs)) // 2
                continue  # what it will want is not known before it is asked
            if len(self._free) <= left:
                return
            placement = store.placement()
            mine = [run for run in self._runs if run.store is store]
            for piece in self._not_asked(store, placement, mine):
                if len(self._free) <= left:
                    return
                self._ask(store, placement, piece, urgent=False)

    def _have_buffer(self, store: LayerStore) -> bool:
        """Whether a buffer is free; those of layers that come later are taken if this one has none at all."""
        if not self._free and not any(run.store is store for run in self._runs):
            self._drop(self._runs[-1])
        return bool(self._free)

    def _ask(self, store: LayerStore, placement: Placement, piece: Piece, *, urgent: bool) -> Run:
        buffer = self._free.pop()
        nbytes = len(piece.blocks) * store.layout.slot_nbytes
        try:
            transfer = store.file.read(
                piece.first, len(piece.blocks), self._memory.arena.view(buffer * self._size, nbytes), urgent=urgent
            )
        except BaseException:
            self._free.append(buffer)
            raise
        self.read_nbytes += nbytes
        run = Run(store=store, placement=placement, piece=piece, buffer=buffer, transfer=transfer)
        self._runs.append(run)
        return run

    def _drop(self, run: Run) -> None:
        run.transfer.cancel()
        with contextlib.suppress(PenstockError):  # nobody wants it: what became of it does not matter
            run.transfer.wait()
        self._give(run)

    def _give(self, run: Run) -> None:
        self._runs.remove(run)
        self._free.append(run.buffer)
        if debug_enabled():
            self._tensor[run.buffer * self._size : (run.buffer + 1) * self._size] = 0xFF


@dataclass(kw_only=True, slots=True)
class _Reads:
    """Of one layer, in one call."""

    store: LayerStore
    placement: Placement
    mine: deque[Run]
    """Asked for."""
    waiting: deque[Piece]
    """For a buffer."""
    ahead: bool
    """Whether buffers that are left go to the next layers."""


def _still(run: Run, placement: Placement) -> tuple[int, ...]:
    """Its blocks, and −1 for those that are not on disk only any more, or not there at all."""
    return tuple(block if placement.on_disk.get(slot) == block else -1 for slot, block in _slots_of(run.piece))


def _slots_of(piece: Piece) -> Iterator[tuple[int, int]]:
    return ((piece.first + at, block) for at, block in enumerate(piece.blocks))
