"""The Triton kernel of `attention_paged`. Importing it needs Triton."""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl

_LOG2E: Final = 1.4426950408889634
LEAST_ROWS: Final = 16
"""Of a matrix product on tensor cores: with fewer queries the rest of a tile is not stored."""
MOST_ROWS: Final = 64
"""Queries of one program."""


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    slots,
    lengths,
    outs,
    lses,
    scale,
    query_row,
    query_head,
    query_one,
    key_slot,
    key_head,
    key_token,
    value_slot,
    value_head,
    value_token,
    slots_row,
    out_part,
    out_row,
    out_head,
    lse_part,
    lse_row,
    lse_head,
    heads,
    queries,
    LOG2E: tl.constexpr,
    PER_PART: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKENS_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    part = tl.program_id(1)
    ones = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PADDED)
    value_dims = tl.arange(0, VALUE_PADDED)
    tokens = tl.arange(0, TOKENS_PADDED)
    length = tl.load(lengths + row)
    asked = tl.load(
        query + row * query_row + head * query_head + ones[:, None] * query_one + dims[None, :],
        mask=(ones[:, None] < queries) & (dims[None, :] < DIM),
        other=0.0,
    )
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, VALUE_PADDED), tl.float32)
    for step in range(PER_PART):
        at = part * PER_PART + step
        there = (tokens < TOKENS) & (at * TOKENS + tokens < length)
        slot = tl.load(slots + row * slots_row + at, mask=at * TOKENS < length, other=0).to(tl.int64)
        block = tl.load(
            keys + slot * key_slot + head * key_head + tokens[:, None] * key_token + dims[None, :],
            mask=there[:, None] & (dims[None, :] < DIM),
            other=0.0,
        )
        scores = tl.dot(asked, tl.trans(block), input_precision="ieee") * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # of a row without tokens so far
        weights = tl.exp2(scores - base[:, None])
        before = tl.exp2(largest - base)
        total = total * before + tl.sum(weights, 1)
        block = tl.load(
            values + slot * value_slot + head * value_head + tokens[:, None] * value_token + value_dims[None, :],
            mask=there[:, None] & (value_dims[None, :] < VALUE_DIM),
            other=0.0,
        )
        out = out * before[:, None] + tl.dot(weights.to(block.dtype), block, input_precision="ieee")
        largest = higher
    some = ones < queries
    tl.store(
        outs + part * out_part + row * out_row + head * out_head + ones[:, None] * VALUE_DIM + value_dims[None, :],
        out / tl.where(total == 0.0, 1.0, total)[:, None],
        mask=some[:, None] & (value_dims[None, :] < VALUE_DIM),
    )
    tl.store(
        lses + part * lse_part + row * lse_row + head * lse_head + ones,
        tl.where(total == 0.0, float("-inf"), (largest + tl.log2(tl.where(total == 0.0, 1.0, total))) / LOG2E),
        mask=some,
    )


def launch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    outs: torch.Tensor,
    lses: torch.Tensor,
    *,
    scale: float,
    per_part: int,
) -> None:
    """Run it: `outs` [parts, rows, kv_heads, queries, value dim] and `lses` [parts, …] are written. Other shapes as in
    `paged_partial`."""
    rows, heads, queries, dim = query.shape
    tokens, value_dim = keys.shape[2], values.shape[3]
    assert outs.is_contiguous(), outs.shape
    assert lses.is_contiguous(), lses.shape
    assert query.stride(3) == keys.stride(3) == values.stride(3) == 1
    tile = min(MOST_ROWS, max(LEAST_ROWS, triton.next_power_of_2(queries)))
    grid: Any = (rows * heads, outs.shape[0], triton.cdiv(queries, tile))
    _attend[grid](
        query, keys, values, slots, lengths, outs, lses, scale * _LOG2E,
        *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], slots.stride(0),
        *outs.stride()[:3], *lses.stride()[:3], heads, queries,
        LOG2E=_LOG2E, PER_PART=per_part,
        TOKENS=tokens, TOKENS_PADDED=max(16, triton.next_power_of_2(tokens)),
        DIM=dim, DIM_PADDED=max(16, triton.next_power_of_2(dim)),
        VALUE_DIM=value_dim, VALUE_PADDED=max(16, triton.next_power_of_2(value_dim)),
        ROWS=tile,
    )  # fmt: skip
