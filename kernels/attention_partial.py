"""Attention of queries to some of the keys, with the log of its sum of exponentials, so that parts can be merged.

    O = softmax(s) V,    ℓ = log Σ exp s,    s = scale · q Kᵀ  (or cap · tanh(s / cap))

Query heads that share a key-value head are rows of it, so that each key is read once for all of them and no head is
ever repeated (GQA, MQA). Keys and values may lie in blocks: strides are free but that of the last dimension.

On a CPU torch's own flash kernel gives both O and ℓ in fp32 accumulation. A single query goes through MKL's products of
a matrix and a vector, which read halves at half the rate of those of two matrices: so it is given twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from .attention_merge import EMPTY, Merging

PIECE_TOKENS: Final = 512
"""Of the plain path: how many keys are looked at at once."""


def reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`partial` in double precision, all at once. Shapes as there."""
    scores = _scores(query.double(), keys.double(), scale, mask, cap)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.nan_to_num((scores - lse[..., None]).exp())
    return (weights @ values.double()).float(), lse.float()


def partial(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `rows` queries to `tokens` keys, for each of `n` blocks (or sequences) by itself.

    Args:
        query: [n, kv_heads, rows, dim]: rows are the query heads of a group, times queries. May be expanded over n.
        keys: [n, kv_heads, tokens, dim], of the same dtype.
        values: [n, kv_heads, tokens, value dim].
        scale: Of the products.
        mask: What may be seen, or is added to scores: bool or floating, broadcast to [n, kv_heads, rows, tokens].
        cap: Scores are kept between −cap and cap (Gemma 2's soft cap).

    Returns:
        The result [n, kv_heads, rows, value dim] in fp32, or in the queries' dtype, and ℓ [n, kv_heads, rows] in fp32;
        0 and −∞ where nothing can be seen.
    """
    n, heads, rows, _ = query.shape
    if not keys.shape[2] or not rows:
        lse = query.new_full((n, heads, rows), EMPTY, dtype=torch.float32)
        return query.new_zeros(n, heads, rows, values.shape[3], dtype=torch.float32), lse
    if not flashes(query, keys, values, cap=cap):
        return _plain(query, keys, values, scale=scale, mask=mask, cap=cap)
    if rows == 1 and query.itemsize == 2 and mask is None:
        out, lse = _flash(_twice(query), keys, values, scale=scale, mask=None)
        return out[:, :, :1], lse[:, :, :1]
    return _flash(query, keys, values, scale=scale, mask=mask)


def _twice(query: torch.Tensor) -> torch.Tensor:
    """A query as two rows, [n, kv_heads, 2, dim]. They have to be there: two rows in one place take the slow way."""
    if query.stride(0) == 0:  # the same for all blocks
        return query[:1].repeat(1, 1, 2, 1).expand(query.shape[0], -1, -1, -1)
    return query.repeat(1, 1, 2, 1)


def flashes(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, cap: float | None) -> bool:
    """Whether torch's flash kernel computes attention of these: [n, heads, tokens, dim] each."""
    return cap is None and keys.shape[3] == values.shape[3] and query.device.type == "cpu"


def causal(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of tokens to themselves and to those before them, without a mask: of half the pairs, not of all.

    Args:
        query: [n, heads, tokens, dim], such that `flashes`.
        keys: Likewise; heads of a group are repeated.
        values: Likewise.
        scale: Of the products.

    Returns:
        The result [n, heads, tokens, dim] in the queries' dtype, and ℓ [n, heads, tokens] in fp32.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values, 0.0, True, scale=scale)
    return out, lse


def _flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's kernel for CPUs. It is not public, and the only one that gives ℓ."""
    bias = None
    if mask is not None:
        bias = bias_of(mask, query.dtype)
        shape = (query.shape[0], 1 if bias.dim() < 4 else bias.shape[-3], query.shape[2], keys.shape[2])
        bias = bias.expand(shape if shape[1] in (1, query.shape[1]) else (*shape[:1], query.shape[1], *shape[2:]))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, False, attn_mask=bias, scale=scale
    )
    if mask is None:
        return out, lse
    seen = _seen(mask).expand(lse.shape)
    return out.masked_fill(~seen[..., None], 0.0), lse.masked_fill(~seen, EMPTY)


def _plain(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None,
    cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whatever torch computes with, piece by piece, in fp32."""
    wide = query.float()
    merging = Merging.of((*query.shape[:3], values.shape[3]), query.device)
    for start, stop in _pieces(keys.shape[2]):
        seen = None if mask is None else mask[..., start:stop] if mask.shape[-1] > 1 else mask
        scores = _scores(wide, keys[:, :, start:stop].float(), scale, seen, cap)
        lse = torch.logsumexp(scores, dim=-1)
        base = lse.masked_fill(lse == EMPTY, 0.0)
        weights = scores.sub_(base[..., None]).exp_()
        merging.add(weights @ values[:, :, start:stop].float(), lse)
    return merging.out, merging.lse


def _scores(
    query: torch.Tensor, keys: torch.Tensor, scale: float, mask: torch.Tensor | None, cap: float | None
) -> torch.Tensor:
    scores = query @ keys.transpose(-1, -2) * scale
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    return scores if mask is None else scores + bias_of(mask, scores.dtype)


def bias_of(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores. A floating mask means by its least number that nothing is seen: nothing is, then."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    if mask.dtype == torch.bool:
        return bias.masked_fill_(~mask, EMPTY)
    return bias.copy_(mask).masked_fill_(_hidden(mask), EMPTY)


def _hidden(mask: torch.Tensor) -> torch.Tensor:
    return ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min


def _seen(mask: torch.Tensor) -> torch.Tensor:
    """Which rows see anything: [..., rows]."""
    return (~_hidden(mask)).any(dim=-1)


def _pieces(tokens: int) -> Iterator[tuple[int, int]]:
    for start in range(0, tokens, PIECE_TOKENS):
        yield start, min(start + PIECE_TOKENS, tokens)
