"""Partial attention to blocks where they lie in an arena, found by their slots: for devices that have one.

Like `attention_partial`, with an indirection: row r attends to the blocks whose slots are in its line of a table, of
which it has so many tokens. On a GPU it is one Triton kernel, whose programs take a row, a key-value head and a part of
the row's blocks each; their results are merged by log-sum-exp like all others.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import torch

from .attention_merge import Merging, merge
from .attention_partial import partial

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCKS_AT_ONCE: Final = 32
"""Of a row, that one program attends to: fewer leave it too little to do."""


def reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`paged_partial`, block by block in torch. Shapes as there."""
    merging = Merging.of((*query.shape[:3], values.shape[3]), query.device)
    size = keys.shape[2]
    for row, length in enumerate(lengths.tolist()):
        for at in range(-(-length // size)):
            slot, tokens = int(slots[row, at]), min(size, length - at * size)
            one = slice(row, row + 1)
            out, lse = partial(query[one], keys[slot, None, :, :tokens], values[slot, None, :, :tokens], scale=scale)
            merging.add(out, lse, torch.tensor([row], device=query.device))
    return merging.out, merging.lse


def paged_partial(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each row's queries to its blocks.

    Args:
        query: [rows, kv_heads, queries, dim]: query heads of a group, times queries.
        keys: [slots, kv_heads, block tokens, dim], a view of the arena; the last dimension is contiguous.
        values: [slots, kv_heads, block tokens, value dim], likewise.
        slots: [rows, blocks], int32: those of each row, in order; what is beyond its length is not looked at.
        lengths: [rows], int32: tokens.
        scale: Of the products.

    Returns:
        The result [rows, kv_heads, queries, value dim] and its log of the sum [rows, kv_heads, queries], both fp32; 0
        and −∞ for a row without tokens.
    """
    kernel = _kernel() if query.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else None
    if kernel is None:
        return reference(query, keys, values, slots, lengths, scale=scale)
    return kernel(query, keys, values, slots, lengths, scale)


def _kernel() -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """The Triton path; None where Triton is not installed."""
    try:
        from .attention_paged_triton import launch
    except ImportError:
        return None

    def run(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        lengths: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, heads, queries, _ = query.shape
        parts = max(1, -(-slots.shape[1] // BLOCKS_AT_ONCE))
        outs = query.new_empty(parts, rows, heads, queries, values.shape[3], dtype=torch.float32)
        lses = query.new_empty(parts, rows, heads, queries, dtype=torch.float32)
        launch(query, keys, values, slots, lengths, outs, lses, scale=scale, per_part=BLOCKS_AT_ONCE)
        return merge(outs, lses)

    return run
