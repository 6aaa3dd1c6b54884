"""All layers of one cache that are kept in tiers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ...kernels.attention_wide import Widening
from ...kernels.kv_codec import BITS
from ...memory.errors import ClosedError, PenstockError, UsageError
from ..devices.base import Device
from .coded import CodedLayout
from .figures import KvStatistics
from .layout import BlockLayout
from .memory import KvBudget, KvMemory
from .reader import KvReader
from .store import LayerStore


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
        self._memory: KvMemory | None = None
        self._stores: list[LayerStore | None] = [None] * layers
        self.reader = KvReader(self._stores)
        self.widening = Widening()
        """Of what they have."""
        self._broken = False
        self._closed = False
        self._making = threading.RLock()
        """Held while memory is taken or given back: nobody takes any once it was closed."""

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
        home = store.rooms.home
        store.append(keys.detach().to(home), values.detach().to(home))

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
                "reset the cache, or make a new one for another batch; rows are repeated by batch_repeat_interleave"
            )
        return store

    def rows(self) -> int:
        """Sequences; 0 before the first token."""
        return max((store.rows for store in self._stores if store is not None), default=0)

    def layouts(self) -> tuple[BlockLayout, ...]:
        """Of the blocks of each layer that has any."""
        return tuple(store.layout for store in self._stores if store is not None)

    def crop(self, number: int, tokens: int) -> None:
        """Forget all but so many positions of a layer."""
        store = self._stores[number]
        if store is not None:
            self.reader.forget()
            store.crop(tokens)
            self.paddings = tuple(store.table.padding(row) for row in range(store.rows))

    def reorder(self, number: int, sources: Sequence[int]) -> None:
        """Rows of a layer go on as copies of others."""
        store = self._stores[number]
        if store is not None:
            self.reader.forget()
            store.reorder(sources)
            self.paddings = tuple(store.table.padding(row) for row in range(store.rows))

    def reset(self, number: int) -> None:
        """Forget all of a layer, its shape and rows as well."""
        store, self._stores[number] = self._stores[number], None
        self.reader.forget()
        if store is not None:
            store.close()
        if not any(self._stores):
            self.paddings, self._broken = None, False
            self.reader.closes()

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
            read_nbytes=self.reader.read_nbytes(),
            written_nbytes=sum(store.written_nbytes for store in stores),
            sent_nbytes=there.sent_nbytes if there is not None else 0,
            fetched_nbytes=there.fetched_nbytes if there is not None else 0,
            appended_nbytes=sum(table.written_nbytes for _, table, _ in both),
            copied_nbytes=sum(table.copied_nbytes for _, table, _ in both),
            codec=self.codec,
        )

    def close(self) -> None:
        """Stop reads and writes, remove the files, give all memory back. More than once does no harm."""
        with self._making:
            self._closed = True
            memory, self._memory = self._memory, None
            self.reader.closes()
            self._stores[:] = [None] * self._layers
            device, self._device = self._device, None
        try:
            if memory is not None:
                memory.close()
        finally:
            if device is not None and self._owned:
                device.close()

    def _make(self, number: int, keys: torch.Tensor, values: torch.Tensor) -> LayerStore:
        if keys.dtype != values.dtype:
            raise UsageError(f"keys are {keys.dtype} and values {values.dtype}: they are kept in blocks of one dtype")
        with self._making:
            self._require_open()
            if self._memory is None:
                self._memory = KvMemory(
                    self.budget,
                    layers=self._layers,
                    folder=self._folder,
                    owner=f"keys and values {id(self):x}",
                    device=self._device,
                )
            layout = self._layout(number, keys, values)
            paddings = self.paddings_of(number, keys.shape[0])
            chooses = number >= self._dense_layers
            store = LayerStore(number, layout, self._memory, paddings, chooses=chooses)
            self.reader.opens(store, self._memory)
            self._stores[number] = store
        if self.paddings is None:
            self.paddings = paddings
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
