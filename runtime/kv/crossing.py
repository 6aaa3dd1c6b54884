"""What a layer has in host memory, attended to by both processors: the CPU where it lies, the device what it is sent.

Pieces that cross go through a ring in device memory: as many as fit are under way while the CPU attends to the others,
and each that arrives is attended to between two of the CPU's. How many cross is `scheduler/kv/balance.py`'s.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...memory.arena import PAGE, HostArena, debug_enabled
from ...memory.errors import UsageError
from ...scheduler.kv.balance import Balance, Seen
from ...scheduler.mover import Event
from .attention import Blocks
from .devicememory import PIECE_NBYTES, PIECES, DeviceMemory
from .placement import Piece
from .store import LayerStore


@dataclass(frozen=True, kw_only=True, slots=True)
class _Flight:
    """A piece on its way."""

    piece: Piece
    buffer: int
    arrived: Event


class Crossing:
    """The ring of one cache. Used by the thread that attends.

    Args:
        memory: Of the device.
        host: The arena that pieces come from.
        balance: How much of what is there crosses.
        slot_nbytes: Of the first layer's blocks, or of larger ones.
        after: What has passed before the memory may be written to: another ring may have been there.
    """

    def __init__(
        self, memory: DeviceMemory, host: HostArena, balance: Balance, slot_nbytes: int, *, after: Event = None
    ) -> None:
        self._memory = memory
        self._tensor = memory.tensor
        """Its own, as that of `ReadAhead`."""
        self._host = host
        self.balance = balance
        self._size = max(slot_nbytes, min(PIECE_NBYTES, memory.ring_nbytes // PIECES) // PAGE * PAGE)
        """Of a buffer."""
        self._free: deque[tuple[int, Event]] = deque(
            (buffer, after) for buffer in range(memory.ring_nbytes // self._size)
        )
        """Buffers, and events until which they are read; those that were free longest first."""
        self.attended: Event = after
        """Behind all that has been read of them."""

    def piece_blocks(self, slot_nbytes: int) -> int:
        """How many blocks of this size cross at once, at most.

        Raises:
            UsageError: not one does: layers before this one have much smaller blocks.
        """
        if slot_nbytes > self._size:
            raise UsageError(
                f"a layer has blocks of {slot_nbytes} bytes, and what crosses to the device is cut into {self._size}, "
                "by the blocks of layers before it: use fewer tokens per block (block_tokens=…), or leave device= out"
            )
        return self._size // slot_nbytes

    def blocks(self, store: LayerStore, pieces: Sequence[Piece], queries: int) -> Iterator[Blocks]:
        """Pieces of a layer in host memory, on the side that is to attend to them.

        Args:
            store: Of the layer.
            pieces: All of them.
            queries: That use each key.
        """
        unit = store.layout.slot_nbytes
        nbytes = sum(len(piece.blocks) for piece in pieces) * unit
        crossing = self.balance.to_cross(queries, pieces=len(pieces), nbytes=nbytes)
        stay, cross = pieces[: len(pieces) - crossing], deque(pieces[len(pieces) - crossing :])
        cross_nbytes = sum(len(piece.blocks) for piece in cross) * unit
        flights: deque[_Flight] = deque()
        began_s = time.perf_counter()
        cpu_s = 0.0
        try:
            self._send(store, cross, flights)
            for piece in stay:
                start_s = time.perf_counter()
                yield store.here(piece)
                cpu_s += time.perf_counter() - start_s
                while flights and self._memory.device.passed(flights[0].arrived):
                    yield from self._land(store, flights)
                    self._send(store, cross, flights)
            link_s, waited = time.perf_counter() - began_s, False
            while flights:
                waited = waited or not self._memory.device.passed(flights[-1].arrived)
                self._memory.device.wait(flights[0].arrived)
                link_s = time.perf_counter() - began_s if waited else link_s
                yield from self._land(store, flights)
                self._send(store, cross, flights)
            assert not cross, "a ring without buffers"
        finally:
            # Slots that pieces came from may be given to other blocks when this ends.
            while flights:
                flight = flights.popleft()
                self._memory.device.wait(flight.arrived)
                self._free.append((flight.buffer, None))
        if stay or cross_nbytes:
            seen = Seen(
                cpu_nbytes=nbytes - cross_nbytes, cpu_s=cpu_s, link_nbytes=cross_nbytes, link_s=link_s, waited=waited
            )
            self.balance.hear(queries, seen)

    def _send(self, store: LayerStore, cross: deque[Piece], flights: deque[_Flight]) -> None:
        """Have as many pieces under way as the ring has buffers."""
        unit = store.layout.slot_nbytes
        while cross and self._free:
            piece = cross[0]
            assert len(piece.blocks) * unit <= self._size, (piece, unit, self._size)
            buffer, used = self._free[0]
            arrived = self._memory.fetch(
                self._host, store.rooms.address(piece.first), buffer * self._size, len(piece.blocks) * unit, after=used
            )
            self._free.popleft()
            cross.popleft()
            flights.append(_Flight(piece=piece, buffer=buffer, arrived=arrived))

    def _land(self, store: LayerStore, flights: deque[_Flight]) -> Iterator[Blocks]:
        """The piece that was sent first, in the device's memory; its buffer is free once it was attended to."""
        flight = flights.popleft()
        start = flight.buffer * self._size
        nbytes = len(flight.piece.blocks) * store.layout.slot_nbytes
        device = self._memory.device
        try:
            device.compute_waits(flight.arrived)
            slots = self._tensor[start : start + nbytes]
            yield store.layout.keys(slots), store.layout.values(slots), flight.piece.spans
        finally:
            device.wait(flight.arrived)  # on the host: the slot that it came from may be given to another block
            if debug_enabled():
                self._tensor[start : start + nbytes] = 0xFF  # behind who attended, and before the next copy
            self.attended = device.computed()
            self._free.append((flight.buffer, self.attended))
