"""All layers of one cache that are kept in tiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ...kernels.kv_codec import BITS
from ...memory.errors import ClosedError, PenstockError, UsageError
from ...scheduler.kv.balance import Balance
from ..devices.base import Device
from .attention import Blocks
from .coded import CodedLayout
from .crossing import Crossing
from .figures import KvStatistics
from .layout import BlockLayout
from .memory import KvBudget, KvMemory
from .placement import Piece
from .reading import ReadAhead
from .spread import Span
from .store import Beginning, LayerStore
from .stored import StoredRow


class KvTiers:
    """Keys and values of the layers of one cache. Memory is taken with the first token.

    Args:
        budget: Of all layers together.
        layers: How many there are.
        folder: For files; None for the default one.
        block_tokens: Of a block.
        device: Whose memory the budget names; None where it names none.
        owned: Whether it is closed with them.
        dense_layers: First layers, of which all is read; None for all of them. Of the others a policy chooses.
        codec: Of full blocks, see `kv_codec`; None to keep them as they are.
    """

    def __init__(
        self,
        budget: KvBudget,
        *,
        layers: int,
        folder: str | None,
        block_tokens: int,
        device: Device | None = None,
        owned: bool = False,
        dense_layers: int | None = None,
        codec: str | None = None,
    ) -> None:
        if block_tokens < 1:
            raise UsageError(f"a block holds a token at least; block_tokens is {block_tokens}")
        self.budget = budget
        if codec is not None and codec not in BITS:
            raise UsageError(
                f"codec {codec!r} is not known: use {', '.join(BITS)}, or none for keys and values as they are"
            )
        self.block_tokens = block_tokens
        self.codec = codec
        self.paddings: tuple[int, ...] | None = None
        """Of each row, as far as masks have told; None before."""
        self._layers = layers
        self._dense_layers = layers if dense_layers is None else dense_layers
        self._folder = folder
        self._device = device
        self._owned = owned
        self._crossing: Crossing | None = None
        self._balance = Balance()
        self._memory: KvMemory | None = None
        self._reading: ReadAhead | None = None
        self._stores: list[LayerStore | None] = [None] * layers
        self._broken = False
        self._closed = False

    def store(self, number: int) -> LayerStore | None:
        """What a layer has; None before its first token."""
        return self._stores[number]

    def require_in_step(self, number: int, new: int) -> None:
        """See that a layer that gets `new` tokens has as many then as the one before it.

        Raises:
            PenstockError: it has not, or the cache was closed.
        """
        self._require_open()
        before, store = self._stores[number - 1] if number else None, self._stores[number]
        mine = (0 if store is None else store.tokens) + new
        if self._broken or (before is not None and mine != before.tokens):
            raise PenstockError(
                "a call was interrupted by an error, and the cache has only a part of its tokens: reset it "
                "(cache.reset()), and begin again"
            )

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the cache of keys and values was closed; make a new one")

    @contextmanager
    def in_whole(self) -> Iterator[None]:
        """What is done here is done in whole, or the cache has to be reset."""
        try:
            yield
        except BaseException:
            self._broken = True
            raise

    def append(self, number: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens to a layer: [rows, kv_heads, tokens, dim].

        Raises:
            UsageError: they do not fit what the layer has: other heads, rows or dtypes.
            DoesNotFitError: budgets have no room.
            DiskError: what had to leave for them could not be written.
        """
        store = self._fitting(number, keys, values)
        store.append(keys.detach().to(store.home), values.detach().to(store.home))

    def append_blocks(self, layout: BlockLayout, slots: torch.Tensor) -> None:
        """Add whole blocks to a layer of one sequence that has only such, without padding: [blocks, slot bytes].

        Raises:
            UsageError: as `append`.
            DoesNotFitError: likewise.
            DiskError: likewise.
        """
        keys, values = layout.keys(slots[0]), layout.values(slots[0])
        self._fitting(layout.layer, keys, values).append_blocks(slots)

    def _fitting(self, number: int, keys: torch.Tensor, values: torch.Tensor) -> LayerStore:
        """What a layer has, or is to have, made for such keys and values."""
        store = self._stores[number] or self._make(number, keys, values)
        layout = store.layout
        known = (store.rows, layout.heads, layout.key_dim, layout.value_dim, layout.dtype)
        given = (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        if known != given:
            raise UsageError(
                f"layer {number} has keys and values of (rows, heads, dims, dtype) {known} and was given {given}: "
                "reset the cache, or make a new one for another batch"
            )
        return store

    def row(self, number: int, row: int, new: tuple[torch.Tensor, torch.Tensor] | None = None) -> StoredRow:
        """One sequence in one layer, to read some of it. It is good until something is appended.

        Args:
            number: Of the layer.
            row: Of the batch.
            new: Keys and values [kv_heads, tokens, dim] that follow what is stored.

        Raises:
            DiskError: what had to leave for it could not be written, or its end cannot be read.
        """
        store = self._stores[number]
        if store is None:
            assert new is not None, number
            return StoredRow(None, row, new, _nothing)
        store.collect()
        ends = [self._beginning(store, part) for part in store.beginnings() if part.row == row]
        parts = [(keys[0].clone(), values[0].clone()) for keys, values, _ in ends] + ([] if new is None else [new])
        if not parts:
            layout = store.layout
            dims = (layout.key_dim, layout.value_dim)
            none = [torch.zeros(layout.heads, 0, dim, dtype=layout.dtype) for dim in dims]
            parts.append((none[0], none[1]))
        end = (torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts], dim=1))
        return StoredRow(store, row, end, lambda wanted: self._ahead(store).some(store, wanted))

    def read_nbytes(self) -> int:
        """From disk, until now."""
        return self._reading.read_nbytes if self._reading is not None else 0

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
        if self._crossing is not None and queries is not None:
            yield from self._crossing.blocks(store, placement.host, queries)
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

    def rows(self) -> int:
        """Sequences; 0 before the first token."""
        return max((store.rows for store in self._stores if store is not None), default=0)

    def layouts(self) -> tuple[BlockLayout, ...]:
        """Of the blocks of each layer that has any."""
        return tuple(store.layout for store in self._stores if store is not None)

    def block_bytes(self, index: int) -> bytes:
        """A whole block of the first row in all layers, one slot after the other.

        Raises:
            DiskError: a layer has it on disk, and it cannot be read.
        """
        parts = []
        for store in self._stores:
            if store is not None:
                tier, slot = store.find(index)
                held = store.held(tier, slot)
                slots = self._ahead(store).block(store, slot) if held is None else held
                parts.append(slots.cpu().numpy().tobytes())
        return b"".join(parts)

    def crop(self, number: int, tokens: int) -> None:
        """Forget all but so many positions of a layer."""
        store = self._stores[number]
        if store is not None:
            self._forget_reads()
            store.crop(tokens)
            self.paddings = tuple(store.table.padding(row) for row in range(store.rows))

    def reorder(self, number: int, sources: Sequence[int]) -> None:
        """Rows of a layer go on as copies of others."""
        store = self._stores[number]
        if store is not None:
            self._forget_reads()
            store.reorder(sources)
            self.paddings = tuple(store.table.padding(row) for row in range(store.rows))

    def reset(self, number: int) -> None:
        """Forget all of a layer, its shape and rows as well."""
        store, self._stores[number] = self._stores[number], None
        self._forget_reads()
        if store is not None:
            store.close()
        if not any(self._stores):
            self.paddings, self._broken = None, False
            self._reading = self._crossing = None  # the next blocks may be larger

    def paddings_of(self, number: int, rows: int) -> tuple[int, ...]:
        """Positions at the beginning of each row that hold nothing."""
        store = self._stores[number]
        if store is not None:
            return tuple(store.table.padding(row) for row in range(store.rows))
        return self.paddings if self.paddings is not None and len(self.paddings) == rows else (0,) * rows

    def pad(self, paddings: Sequence[int]) -> bool:
        """Hear what masks say of the rows' padding; whether what is stored agrees with it."""
        if self.paddings is None or all(store is None for store in self._stores):
            self.paddings = tuple(paddings)
            return True
        stores = [store for store in self._stores if store is not None]
        rows = stores[0].rows
        if len(paddings) != rows:
            return False
        for row, padding in enumerate(paddings):
            for store in stores:
                if padding > store.table.padding(row) and store.tokens <= store.table.padding(row):
                    store.table.pad(row, padding)
        self.paddings = tuple(stores[0].table.padding(row) for row in range(rows))
        return self.paddings == tuple(paddings)

    def statistics(self) -> KvStatistics:
        """A frozen record."""
        stores = [store for store in self._stores if store is not None]
        both = [(store, *store.statistics()) for store in stores]

        def used(name: str) -> int:
            return sum(tier.used_nbytes for _, _, tiers in both for tier in tiers if tier.name == name)

        there = self._memory.device if self._memory is not None else None

        return KvStatistics(
            tokens=max((store.tokens for store in stores), default=0),
            rows=max((store.rows for store in stores), default=0),
            kv_nbytes=sum(table.tokens * store.layout.token_nbytes for store, table, _ in both),
            host_nbytes=used("host"),
            disk_nbytes=used("disk"),
            device_nbytes=used("device"),
            device_budget_nbytes=self.budget.device,
            host_budget_nbytes=self.budget.host,
            arena_nbytes=self._memory.arena.nbytes if self._memory is not None else 0,
            read_nbytes=self.read_nbytes(),
            written_nbytes=sum(store.written_nbytes for store in stores),
            sent_nbytes=there.sent_nbytes if there is not None else 0,
            fetched_nbytes=there.fetched_nbytes if there is not None else 0,
            appended_nbytes=sum(table.written_nbytes for _, table, _ in both),
            copied_nbytes=sum(table.copied_nbytes for _, table, _ in both),
            codec=self.codec,
        )

    def close(self) -> None:
        """Stop reads and writes, remove the files, give all memory back. More than once does no harm."""
        self._closed = True
        memory, self._memory, self._reading = self._memory, None, None
        self._crossing = None
        self._stores = [None] * self._layers
        device, self._device = self._device, None
        try:
            if memory is not None:
                memory.close()
        finally:
            if device is not None and self._owned:
                device.close()

    def _make(self, number: int, keys: torch.Tensor, values: torch.Tensor) -> LayerStore:
        self._require_open()
        if keys.dtype != values.dtype:
            raise UsageError(f"keys are {keys.dtype} and values {values.dtype}: they are kept in blocks of one dtype")
        if self._memory is None:
            self._memory = KvMemory(
                self.budget,
                layers=self._layers,
                folder=self._folder,
                owner=f"keys and values {id(self):x}",
                device=self._device,
            )
        layout = self._layout(number, keys, values)
        rows = keys.shape[0]
        paddings = self.paddings_of(number, rows)
        chooses = number >= self._dense_layers
        store = self._stores[number] = LayerStore(number, layout, self._memory, paddings, chooses=chooses)
        if self.paddings is None:
            self.paddings = paddings
        if self._memory.device is not None:
            if self._crossing is None:
                self._crossing = Crossing(self._memory.device, self._memory.arena, self._balance, layout.slot_nbytes)
            store.piece_blocks = self._crossing.piece_blocks(layout.slot_nbytes)
        return store

    def _layout(self, number: int, keys: torch.Tensor, values: torch.Tensor) -> BlockLayout:
        known = {
            "layer": number,
            "heads": keys.shape[1],
            "key_dim": keys.shape[3],
            "value_dim": values.shape[3],
            "block_tokens": self.block_tokens,
        }
        if self.codec is None:
            return BlockLayout(dtype=keys.dtype, **known)
        return CodedLayout(dtype=keys.dtype, codec=self.codec, **known)

    def _reads(self, store: LayerStore, *, ahead: bool) -> Iterator[tuple[Piece, torch.Tensor]]:
        if not store.placement().on_disk:
            return iter(())
        stores = [one for one in self._stores if one is not None]
        return self._ahead(store).blocks(stores, stores.index(store), ahead=ahead)

    def _ahead(self, store: LayerStore) -> ReadAhead:
        if self._reading is None:
            assert self._memory is not None
            self._reading = ReadAhead(self._memory, store.layout.slot_nbytes)
        return self._reading

    def _beginnings(self, store: LayerStore) -> Iterator[Blocks]:
        for part in store.beginnings():
            yield self._beginning(store, part)

    def _beginning(self, store: LayerStore, part: Beginning) -> Blocks:
        grown = store.grown(part)
        if grown is None:
            slots = self._ahead(store).block(store, part.slot)
            grown = store.layout.keys(slots), store.layout.values(slots)
        keys, values = grown
        rows, positions = torch.tensor([[part.row]]), torch.tensor([[part.position]])
        span = Span(first=0, rows=rows, positions=positions, alike=(part.row,))
        return keys[:, :, : part.tokens], values[:, :, : part.tokens], (span,)

    def _forget_reads(self) -> None:
        if self._reading is not None:
            self._reading.forget()


def _nothing(wanted: dict[int, int]) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Of a layer that has nothing on disk yet."""
    assert not wanted
    return iter(())
