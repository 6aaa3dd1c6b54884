"""How keys and values of one layer lie in a slot: all keys of a block, then all values, each by head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...memory.arena import round_up
from ...scheduler.kv.shape import KvShape, LayerGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLayout:
    """Blocks of one layer."""

    layer: int
    heads: int
    """Of keys and values."""
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    block_tokens: int

    @property
    def token_nbytes(self) -> int:
        """Keys and values of one token."""
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize

    @property
    def stored_token_nbytes(self) -> int:
        """Of one token in a slot."""
        return self.token_nbytes

    @property
    def slot_nbytes(self) -> int:
        """Bytes of a slot: whole pages."""
        return round_up(self.token_nbytes * self.block_tokens)

    @property
    def shape(self) -> KvShape:
        """What the block table knows of it."""
        return KvShape(
            groups=(LayerGroup(layers=(self.layer,), token_nbytes=self.token_nbytes),), block_tokens=self.block_tokens
        )

    def keys(self, slots: torch.Tensor) -> torch.Tensor:
        """A view of the keys in slots that follow each other, [slots · bytes] → [slots, heads, tokens, key dim]."""
        return self._view(slots, 0, self.key_dim)

    def values(self, slots: torch.Tensor) -> torch.Tensor:
        """A view of their values, [slots, heads, tokens, value dim]."""
        return self._view(slots, self.heads * self.block_tokens * self.key_dim, self.value_dim)

    def take(
        self, slots: torch.Tensor, where: torch.Tensor, head: int, inside: torch.Tensor, *, values: bool
    ) -> torch.Tensor:
        """Keys or values of some tokens of a head, and no others: [tokens, dim].

        Args:
            slots: Bytes of slots that follow each other.
            where: Number of each token's slot among them.
            head: Of keys and values.
            inside: Place of each token in its block.
            values: Whether values are wanted.
        """
        return (self.values(slots) if values else self.keys(slots))[where, head, inside]

    def taken_nbytes(self, tokens: int, blocks: int, *, values: bool) -> int:
        """What taking so many tokens of so many blocks reads, of one head."""
        return tokens * (self.value_dim if values else self.key_dim) * self.dtype.itemsize

    def _view(self, slots: torch.Tensor, start: int, dim: int) -> torch.Tensor:
        elements = slots.view(self.dtype)
        slot = self.slot_nbytes // self.dtype.itemsize
        tokens = self.block_tokens
        return elements.as_strided(
            (len(elements) // slot, self.heads, tokens, dim),
            (slot, tokens * dim, dim, 1),
            elements.storage_offset() + start,
        )
