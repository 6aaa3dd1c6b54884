"""What the layers of one cache have, on its way to who reads it: in memory, crossing to a device, or from disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...memory.errors import ClosedError
from ...scheduler.kv.balance import Balance
from ...scheduler.mover import Event
from .attention import Blocks
from .crossing import Crossing
from .memory import KvMemory
from .placement import Piece
from .reading import ReadAhead
from .spread import Span
from .store import Beginning, LayerStore
from .stored import StoredRow


class KvReader:
    """Reads the layers of one cache.

    Args:
        stores: Of all layers; None for those that have nothing. It is the cache's own, and changes.
    """

    def __init__(self, stores: Sequence[LayerStore | None]) -> None:
        self._stores = stores
        self._balance = Balance()
        self._memory: KvMemory | None = None
        self._ring: ReadAhead | None = None
        self._attended: Event = None
        """Behind what was read of the ring in the device's memory that is no more."""
        self.crossing: Crossing | None = None
        """What is sent to a device to be attended to there; None where nothing is."""

    def opens(self, store: LayerStore, memory: KvMemory) -> None:
        """Hear of a layer that is going to have something, and of the cache's memory."""
        self._memory = memory
        if memory.device is not None:
            if self.crossing is None:
                self.crossing = Crossing(
                    memory.device, memory.arena, self._balance, store.layout.slot_nbytes, after=self._attended
                )
            store.piece_blocks = self.crossing.piece_blocks(store.layout.slot_nbytes)

    def forget(self) -> None:
        """Drop what was read ahead: blocks have gone, and slots may get others."""
        if self._ring is not None:
            self._ring.forget()

    def closes(self) -> None:
        """Hear that nothing is there any more, and that the next blocks may be larger. What is read goes on to its end
        with the memory that it has."""
        if self.crossing is not None:
            self._attended = self.crossing.attended
        self._memory = self._ring = self.crossing = None

    def row(self, number: int, row: int, new: tuple[torch.Tensor, torch.Tensor] | None = None) -> StoredRow:
        """One sequence in one layer, to read some of it. It is good until something is appended.

        Args:
            number: Of the layer.
            row: Of the batch.
            new: Keys and values [kv_heads, tokens, dim] that follow what is stored, where its blocks grow.

        Raises:
            DiskError: what had to leave for it could not be written, or its end cannot be read.
        """
        store = self._stores[number]
        if store is None:
            assert new is not None, number
            return StoredRow(None, row, new, _nothing)
        store.collect()
        ends = [self._beginning(store, part) for part in store.beginnings() if part.row == row]
        home = store.rooms.home  # one that was cut to its beginning may lie below
        parts = [(keys[0].to(home, copy=True), values[0].to(home, copy=True)) for keys, values, _ in ends]
        parts += [] if new is None else [new]
        if not parts:
            layout = store.layout
            dims = (layout.key_dim, layout.value_dim)
            none = [torch.zeros(layout.heads, 0, dim, dtype=layout.dtype, device=home) for dim in dims]
            parts.append((none[0], none[1]))
        end = (torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts], dim=1))
        return StoredRow(store, row, end, lambda wanted: self._ahead(store).some(store, wanted))

    def read_nbytes(self) -> int:
        """From disk, until now."""
        return self._ring.read_nbytes if self._ring is not None else 0

    def blocks(self, number: int, *, queries: int | None = None, ahead: bool = True) -> Iterator[Blocks]:
        """All that a layer has: the rest is being read while what is in memory is attended to.

        Args:
            number: Of the layer.
            queries: That use each key: by them a part of what is in host memory crosses to the device. None where
                nobody attends.
            ahead: Whether to read what the next layers want, too, as far as buffers reach.

        Raises:
            DiskError: it could not be read.
        """
        store = self._stores[number]
        if store is None:
            return
        store.collect()  # here and not later: a block that changes its place meanwhile would be missed
        yield from self._beginnings(store)  # first: one that is on disk takes a buffer
        reads = self._reads(store, ahead=ahead)
        placement = store.placement()
        for piece in placement.device:
            yield store.there(piece)
        if self.crossing is not None and queries is not None:
            yield from self.crossing.blocks(store, placement.host, queries)
        else:
            for piece in placement.host:
                yield store.here(piece)
        for piece, slots in reads:
            yield store.layout.keys(slots), store.layout.values(slots), piece.spans

    def cold(self, number: int) -> bool:
        """Whether any of a layer is to be attended to outside of the device's memory."""
        store = self._stores[number]
        if store is None or store.numbers.device is None:
            return store is not None
        placement = store.placement()
        ends = any(part.tier != store.numbers.device for part in store.beginnings())
        return ends or bool(placement.host) or bool(placement.on_disk)

    def whole(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, put together: [rows, kv_heads, positions, dim]; 0 where padding is."""
        store = self._stores[number]
        assert store is not None, number
        layout = store.layout
        shape = (store.rows, layout.heads, store.tokens)
        keys = torch.zeros(*shape, layout.key_dim, dtype=layout.dtype)
        values = torch.zeros(*shape, layout.value_dim, dtype=layout.dtype)
        for some_keys, some_values, spans in self.blocks(number):
            tokens = some_keys.shape[2]
            for span in spans:
                for at in range(span.count):
                    for row, position in zip(span.rows[at].tolist(), span.positions[at].tolist(), strict=True):
                        place = slice(position, position + tokens)
                        keys[row, :, place] = some_keys[span.first + at]
                        values[row, :, place] = some_values[span.first + at]
        return keys, values

    def block_bytes(self, index: int) -> bytes:
        """A whole block of the first row in all layers, one slot after the other.

        Raises:
            DiskError: a layer has it on disk, and it cannot be read.
        """
        parts = []
        for store in self._stores:
            if store is not None:
                tier, slot = store.find(index)
                held = store.rooms.held(tier, slot)
                slots = self._ahead(store).block(store, slot) if held is None else held
                parts.append(slots.cpu().numpy().tobytes())
        return b"".join(parts)

    def _reads(self, store: LayerStore, *, ahead: bool) -> Iterator[tuple[Piece, torch.Tensor]]:
        if not store.placement().on_disk:
            return iter(())
        stores = [one for one in self._stores if one is not None]
        return self._ahead(store).blocks(stores, stores.index(store), ahead=ahead)

    def _ahead(self, store: LayerStore) -> ReadAhead:
        if self._ring is None:
            if self._memory is None:
                raise ClosedError("the cache of keys and values was closed while it was read; make a new one")
            self._ring = ReadAhead(self._memory, store.layout.slot_nbytes)
        return self._ring

    def _beginnings(self, store: LayerStore) -> Iterator[Blocks]:
        for part in store.beginnings():
            yield self._beginning(store, part)

    def _beginning(self, store: LayerStore, part: Beginning) -> Blocks:
        grown = store.rooms.grown(part.tier, part.slot, part.tokens)
        if grown is None:
            slots = self._ahead(store).block(store, part.slot)
            grown = store.layout.keys(slots), store.layout.values(slots)
        keys, values = grown
        rows, positions = torch.tensor([[part.row]]), torch.tensor([[part.position]])
        span = Span(first=0, rows=rows, positions=positions, alike=(part.row,))
        return keys[:, :, : part.tokens], values[:, :, : part.tokens], (span,)


def _nothing(wanted: dict[int, int]) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Of a layer that has nothing on disk yet."""
    assert not wanted
    return iter(())
