"""Caches whose length is known beforehand: keys and values lie in buffers that are made once, and nothing is copied.

transformers' own cache grows by concatenation: every token copies all keys and values of its sequence, and the
allocator keeps room for two of them. Where a run knows how long its sequences become, neither is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class ReservedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, [rows, heads, tokens, head size], as views of buffers that hold `tokens`.

    Whatever else replaces them (a selection of rows, another device) is taken as it is, and gets buffers of its own
    when the next token comes. More tokens than were reserved are kept as `DynamicLayer` keeps them.

    Args:
        tokens: Of each row, at its end.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tokens = tokens
        self._rooms: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens [rows, heads, new tokens, head size]; returns all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if end > self._tokens:
            self._rooms = None
            return super().update(key_states, value_states, *args, **kwargs)
        rooms = self._rooms
        if rooms is None or not (_within(self.keys, rooms[0], length) and _within(self.values, rooms[1], length)):
            rooms = (self._room(self.keys, key_states, length), self._room(self.values, value_states, length))
        for room, new in zip(rooms, (key_states, value_states), strict=True):
            room[:, :, length:end].copy_(new)
        self._rooms = rooms
        self.keys, self.values = rooms[0][:, :, :end], rooms[1][:, :, :end]
        return self.keys, self.values

    def _room(self, held: torch.Tensor | None, new: torch.Tensor, length: int) -> torch.Tensor:
        rows, heads, _, size = new.shape
        room = new.new_empty(rows, heads, self._tokens, size)
        if length:
            assert held is not None
            room[:, :, :length].copy_(held)
        return room

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows. The buffers go at once, not when the next token comes: those of all layers would add up."""
        super().batch_select_indices(indices)
        self._rooms = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self._rooms = None

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = self._rooms = None
        self.is_initialized = False


def reserved_cache(config: Any, tokens: int) -> DynamicCache:
    """The cache that `generate` would make for a decoder, its plain layers with room for `tokens` of each sequence."""
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    cache.layers = [ReservedLayer(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _within(held: torch.Tensor | None, room: torch.Tensor, length: int) -> bool:
    """Whether what is held is the beginning of a buffer."""
    if not length:
        return True
    return (
        held is not None and held.data_ptr() == room.data_ptr() and held.shape == room[:, :, :length].shape
        and held.stride() == room.stride()
    )  # fmt: skip
