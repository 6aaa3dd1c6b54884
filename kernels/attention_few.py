"""Attention of a few queries to half-precision keys that all of them see: for CPUs without products of halves.

    O = softmax(s) V,    ℓ = log Σ exp s,    s = scale · q Kᵀ  (or cap · tanh(s / cap))

A product of few rows is bound by how fast keys come, if they can be multiplied as they are. Torch's flash kernel takes
halves to MKL, which does so only with instructions for them (AVX512-BF16, AMX). Without, it is some times slower than
memory. So here keys and values are widened to fp32, and only as many at once as stay in the processor's cache: memory
is read once, in halves, and sees no fp32. Products of halves are exact in fp32, so results are those of fp32.

Parts follow each other as in `attention_partial`; they are merged with `attention_merge`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import Final

import torch

PIECE_ELEMENTS: Final = 512 * 1024
"""Of keys, or of values, that are widened at once: 2 MiB of fp32 are two cores' second-level caches, and half as many
would double what Python takes for them."""


class _Room(threading.local):
    """Where pieces are widened, one for each thread: fresh memory would cost more than the attention to it."""

    wide: torch.Tensor | None = None

    def of(self, elements: int) -> torch.Tensor:
        """So many elements in fp32, whatever they are."""
        if self.wide is None or self.wide.numel() < elements:
            with torch.inference_mode(False):  # else nothing but inference could ever write to it
                self.wide = torch.empty(max(elements, PIECE_ELEMENTS))
        return self.wide[:elements]


_room = _Room()


@functools.cache
def widens(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype are better widened by us than multiplied by this processor."""
    if dtype is torch.bfloat16:
        return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return dtype is torch.float16 and not torch.cpu._is_amx_fp16_supported()


def few(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, cap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `rows` queries to all tokens of `n` blocks, in some parts.

    Args:
        query: [kv_heads, rows, dim]: the query heads of each group, times queries.
        keys: [n, kv_heads, tokens, dim], in any floating dtype; strides are free but that of the last dimension.
        values: [n, kv_heads, tokens, value dim].
        scale: Of the products.
        cap: Scores are kept between −cap and cap (Gemma 2's soft cap).

    Returns:
        Results [parts, kv_heads, rows, value dim] and their ℓ [parts, kv_heads, rows], both fp32. No part is empty;
        without keys there are none.
    """
    blocks, heads, tokens, dim = keys.shape
    rows, value_dim = query.shape[1], values.shape[3]
    pieces = tuple(_pieces(blocks, tokens, heads * max(dim, value_dim)))
    wide_query = query.float() * scale
    out = torch.empty(len(pieces), heads, rows, value_dim)
    largest, total = torch.empty(2, len(pieces), heads, rows, 1)
    for part, (these, those) in enumerate(pieces):
        scores = torch.bmm(wide_query, _widened(keys[these, :, those]).transpose(1, 2))
        if cap is not None:
            scores = scores.div_(cap).tanh_().mul_(cap)
        torch.amax(scores, dim=-1, keepdim=True, out=largest[part])
        weights = scores.sub_(largest[part]).exp_()
        torch.sum(weights, dim=-1, keepdim=True, out=total[part])
        torch.bmm(weights, _widened(values[these, :, those]), out=out[part])
    return out.div_(total), largest.add_(total.log_())[..., 0]


def _widened(piece: torch.Tensor) -> torch.Tensor:
    """[blocks, heads, tokens, dim] → [heads, blocks · tokens, dim] in fp32, good until the next one."""
    blocks, heads, tokens, dim = piece.shape
    wide = _room.of(piece.numel())
    wide.view(heads, blocks, tokens, dim).copy_(piece.transpose(0, 1))
    return wide.view(heads, blocks * tokens, dim)


def _pieces(blocks: int, tokens: int, token_elements: int) -> Iterator[tuple[slice, slice]]:
    """Blocks, and tokens of each: whole blocks where one is small enough, else parts of one."""
    if not tokens:
        return
    most = max(1, PIECE_ELEMENTS // token_elements)
    at_once, length = max(1, most // tokens), min(tokens, most)
    for first in range(0, blocks, at_once):
        for start in range(0, tokens, length):
            yield slice(first, min(first + at_once, blocks)), slice(start, min(start + length, tokens))
