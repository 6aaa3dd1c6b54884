"""How keys and values are cut into blocks: so many tokens of one sequence, in the layers of one group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from ...memory.arena import round_up
from ...memory.errors import UsageError

TOKENS: Final = 64
"""Of a block, unless something else is asked for: keys and values of one head in 16 bits are then whole pages."""
UNIT_NBYTES: Final = 2**20
"""About what a drive is asked for at once: half of it costs some drives a part of their rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGroup:
    """Layers whose keys and values lie beside each other and move together."""

    layers: tuple[int, ...]
    """Of the model, in the order in which they run."""
    token_nbytes: int
    """Keys and values of one token in all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvShape:
    """The blocks of a cache."""

    groups: tuple[LayerGroup, ...]
    """In the order in which they run. Layers that are kept elsewhere (sliding windows, states) are in none."""
    block_tokens: int = TOKENS

    def __post_init__(self) -> None:
        if not self.groups or self.block_tokens < 1:
            raise UsageError(
                f"a cache needs a group of layers and a block at least a token; here are {len(self.groups)} groups and "
                f"blocks of {self.block_tokens} tokens"
            )
        if any(group.token_nbytes < 1 or not group.layers for group in self.groups):
            raise UsageError("a group of layers needs a layer, and a token takes at least a byte in it")

    @property
    def slot_nbytes(self) -> int:
        """Bytes of a place for any block, whole pages: all places are alike, so that none is ever too small."""
        return round_up(max(group.token_nbytes for group in self.groups) * self.block_tokens)

    @property
    def token_nbytes(self) -> int:
        """Keys and values of one token in all groups."""
        return sum(group.token_nbytes for group in self.groups)


def cut_groups(
    layers: Sequence[tuple[int, int]],
    *,
    context_tokens: int,
    room_nbytes: int,
    block_tokens: int = TOKENS,
    unit_nbytes: int = UNIT_NBYTES,
) -> KvShape:
    """Groups of layers that are worth a request to a drive, and of which two fit beside each other.

    A layer attends to all tokens before the next layer begins. So a group that does not fit as a whole would be read
    once for each of its layers: then, groups are single layers, and a drive is asked for blocks that follow each other.

    Args:
        layers: Number of each layer in the model, and bytes of one token's keys and values in it.
        context_tokens: The longest context, of all sequences together.
        room_nbytes: Of the slowest memory that a processor attends from: the group in use and the next one are to fit.
        block_tokens: Of a block.
        unit_nbytes: What a drive is to be asked for, about.

    Raises:
        UsageError: there are no layers, or a size is not positive.
    """
    if not layers or min(block_tokens, unit_nbytes, context_tokens) < 1:
        raise UsageError(
            f"cannot cut {len(layers)} layers into blocks of {block_tokens} tokens and about {unit_nbytes} bytes for a "
            f"context of {context_tokens} tokens: each must be at least 1"
        )
    largest = max(nbytes for _, nbytes in layers)
    for_unit = max(1, unit_nbytes // (largest * block_tokens))
    for_room = max(1, room_nbytes // (2 * largest * context_tokens))
    count = -(-len(layers) // min(for_unit, for_room))
    bounds = [len(layers) * number // count for number in range(count + 1)]
    groups = [layers[start:stop] for start, stop in pairwise(bounds)]
    return KvShape(
        groups=tuple(
            LayerGroup(layers=tuple(layer for layer, _ in group), token_nbytes=sum(nbytes for _, nbytes in group))
            for group in groups
        ),
        block_tokens=block_tokens,
    )
