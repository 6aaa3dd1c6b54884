"""How coded keys and values of one layer lie in a slot: levels and ranges of keys, then those of values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.kv_codec import BITS, RANGE_NBYTES, decode, encode, width
from ...memory.arena import round_up
from ...scheduler.kv.shape import KvShape, LayerGroup
from .layout import BlockLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class CodedLayout(BlockLayout):
    """Blocks of one layer that are coded when they are sealed. What grows is not coded, and not in a slot."""

    codec: str

    @property
    def bits(self) -> int:
        """Of a level."""
        return BITS[self.codec]

    @property
    def stored_token_nbytes(self) -> int:
        """See `BlockLayout`."""
        return -(-self._offsets[-1] // self.block_tokens)

    @property
    def slot_nbytes(self) -> int:
        """See `BlockLayout`."""
        return round_up(self.stored_token_nbytes * self.block_tokens)

    @property
    def shape(self) -> KvShape:
        """See `BlockLayout`."""
        group = LayerGroup(layers=(self.layer,), token_nbytes=self.stored_token_nbytes)
        return KvShape(groups=(group,), block_tokens=self.block_tokens)

    def keys(self, slots: torch.Tensor) -> torch.Tensor:
        """Keys, decoded: [slots · bytes] → [slots, heads, tokens, key dim]."""
        levels, low, step = self._parts(slots, values=False)
        return self._decoded(levels, low[:, :, None], step[:, :, None], self.key_dim)

    def values(self, slots: torch.Tensor) -> torch.Tensor:
        """Values, decoded: [slots, heads, tokens, value dim]."""
        levels, low, step = self._parts(slots, values=True)
        return self._decoded(levels, low[..., None], step[..., None], self.value_dim)

    def take(
        self, slots: torch.Tensor, where: torch.Tensor, head: int, inside: torch.Tensor, *, values: bool
    ) -> torch.Tensor:
        """See `BlockLayout`."""
        levels, low, step = self._parts(slots, values=values)
        if values:
            at = (where, head, inside)
            return self._decoded(levels[at], low[at][:, None], step[at][:, None], self.value_dim)
        return self._decoded(levels[where, head, inside], low[where, head], step[where, head], self.key_dim)

    def taken_nbytes(self, tokens: int, blocks: int, *, values: bool) -> int:
        """See `BlockLayout`."""
        if values:
            return tokens * (width(self.value_dim, self.bits) + RANGE_NBYTES)
        return tokens * width(self.key_dim, self.bits) + blocks * self.key_dim * RANGE_NBYTES

    def write(self, slot: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Code a full block, [heads, tokens, dim], into the bytes of a slot."""
        for new, is_value in ((keys, False), (values, True)):
            coded = encode(new[None], self.bits, -1 if is_value else -2)
            for room, part in zip(self._parts(slot, values=is_value), coded, strict=True):
                room.copy_(part)

    @property
    def _offsets(self) -> tuple[int, ...]:
        """Where levels and ranges begin, of keys and of values, and where all of it ends."""
        heads, tokens = self.heads, self.block_tokens
        sizes = (
            heads * tokens * width(self.key_dim, self.bits),
            heads * self.key_dim * RANGE_NBYTES,
            heads * tokens * width(self.value_dim, self.bits),
            heads * tokens * RANGE_NBYTES,
        )
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + -(-size // RANGE_NBYTES) * RANGE_NBYTES)  # ranges are aligned
        return tuple(offsets)

    def _parts(self, slots: torch.Tensor, *, values: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of levels [slots, heads, tokens, width], and of ranges [slots, heads, channels or tokens], twice."""
        first, second = self._offsets[2:4] if values else self._offsets[:2]
        dim = self.value_dim if values else self.key_dim
        unit, wide = self.slot_nbytes, width(dim, self.bits)
        shape = (self.heads, self.block_tokens, wide)
        count = self.heads * self.block_tokens * wide
        levels = slots.view(-1, unit)[:, first : first + count].view(-1, *shape)
        ranges = self.block_tokens if values else dim
        words = slots.view(torch.float32).view(-1, unit // 4)[:, second // 4 :]
        low, step = words[:, : self.heads * ranges], words[:, self.heads * ranges : 2 * self.heads * ranges]
        return levels, low.view(-1, self.heads, ranges), step.view(-1, self.heads, ranges)

    def _decoded(self, levels: torch.Tensor, low: torch.Tensor, step: torch.Tensor, dim: int) -> torch.Tensor:
        return decode(levels, low, step, bits=self.bits, dim=dim, dtype=self.dtype)
