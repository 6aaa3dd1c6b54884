"""Attention of a few queries to blocks in half precision on a CPU, in fp32.

torch's kernels for CPUs read halves at a fraction of memory's rate where queries are few: each product with a vector is
prepared by itself. Functions that are compiled for the shape widen what they read in registers
(`attention_compiled.py`). Where there are none, torch widens pieces that stay in the processor's cache, and multiplies
there, which takes less than its own kernels, too. Neither way rounds to halves between the two products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from . import attention_compiled

ROWS: Final = 16
"""Queries of a head up to which this is faster."""
ELEMENTS: Final = 2 * 2**20
"""Of keys and values that are widened at once: 8 MiB, of 2 to 16 the fastest or next to it for heads of 64 to 256."""


class Widening:
    """Memory for pieces, kept between calls where nothing is compiled: 8 MiB. Not for several threads at once."""

    def __init__(self) -> None:
        self._buffer = _empty(0)

    @staticmethod
    def suits(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether it is faster for these: few queries in half precision, to blocks of which at least one fits a piece.

        Args:
            query: [n or 1, kv_heads, rows, dim].
            keys: [n, kv_heads, tokens, dim].
            values: [n, kv_heads, tokens, value dim].
        """
        return (
            query.device.type == "cpu"
            and not (torch.is_grad_enabled() and query.requires_grad)
            and keys.dtype.itemsize == 2
            and query.shape[2] <= ROWS
            and 0 < _elements(keys, values) <= ELEMENTS
        )

    @staticmethod
    def expect(dtype: torch.dtype, *, dim: int, value_dim: int, rows: int) -> None:
        """Have compiled, meanwhile, what attention of so many queries of a head will need."""
        shape = attention_compiled.Shape(dtype=dtype, dim=dim, value_dim=value_dim, rows=rows)
        if shape.is_known and rows <= ROWS:
            attention_compiled.prepare(shape)

    def each(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention to n blocks, each by queries of its own.

        Args:
            query: [n, kv_heads, rows, dim], such that it `suits`; so are keys and values.
            keys: [n, kv_heads, tokens, dim].
            values: [n, kv_heads, tokens, value dim].
            scale: Of the products.

        Returns:
            O [n, kv_heads, rows, value dim] and ℓ [n, kv_heads, rows], both in fp32.
        """
        result = attention_compiled.attend(query, keys, values, scale=scale, joined=False)
        if result is not None:
            return result
        asked = query.float() * scale
        out, lse = _empty(*query.shape[:3], values.shape[3]), _empty(*query.shape[:3])
        for part, wide, others in self._pieces(keys, values):
            shares, largest = _exponentials(asked[part], wide, dims=(3,))
            weight = shares.sum(dim=3, keepdim=True)
            torch.div(shares @ others, weight, out=out[part])
            lse[part] = (largest + weight.log_())[..., 0]
        return out, lse

    def joined(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the same queries to all of n blocks, [1, kv_heads, rows, dim]: some parts, each of some blocks.

        Args:
            query: As said; else as `each`.
            keys: See `each`.
            values: See `each`.
            scale: See `each`.

        Returns:
            O [parts, kv_heads, rows, value dim] and ℓ [parts, kv_heads, rows], both in fp32.
        """
        result = attention_compiled.attend(query, keys, values, scale=scale, joined=True)
        if result is not None:
            return result
        asked = query.float() * scale
        outs, lses = [], []
        for _, wide, others in self._pieces(keys, values):
            shares, largest = _exponentials(asked, wide, dims=(0, 3))
            weight = shares.sum(dim=(0, 3), keepdim=True)
            outs.append((shares @ others).sum(dim=0, keepdim=True).div_(weight))
            lses.append((largest + weight.log_())[..., 0])
        return torch.cat(outs), torch.cat(lses)

    def _pieces(self, keys: torch.Tensor, values: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """So many blocks at a time: which, their keys and values, both in fp32 until the next ones come."""
        count, each = len(keys), _elements(keys, values)
        piece = min(count, ELEMENTS // each)
        if self._buffer.numel() < piece * each:
            with torch.inference_mode(False):  # made within it, it could not be written to outside
                self._buffer = _empty(piece * each)
        for start in range(0, count, piece):
            part = slice(start, min(start + piece, count))
            some, others = keys[part], values[part]
            wide = self._buffer[: some.numel()].view(some.shape)
            rest = self._buffer[some.numel() : some.numel() + others.numel()].view(others.shape)
            yield part, wide.copy_(some), rest.copy_(others)


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever a program has made torch's defaults


def _elements(keys: torch.Tensor, values: torch.Tensor) -> int:
    """Of one block."""
    return keys.shape[1] * keys.shape[2] * (keys.shape[3] + values.shape[3])


def _exponentials(
    query: torch.Tensor, keys: torch.Tensor, *, dims: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(s − largest) [n, kv_heads, rows, tokens], and the largest score over some dimensions, which are kept."""
    scores = query @ keys.mT
    largest = scores.amax(dim=dims, keepdim=True)
    return scores.sub_(largest).exp_(), largest
