"""Attention over parts of the keys, merged: each part gives its result and the log of its sum of exponentials.

With O_i = softmax(s_i) V_i and ℓ_i = log Σ exp s_i over the keys of part i alone, attention over all of them is

    ℓ = log Σ_i exp ℓ_i,        O = Σ_i exp(ℓ_i − ℓ) O_i

which is exact (FlashAttention's online softmax, arXiv 2205.14135, in other words). All of it is done in fp32. A part
without visible keys has ℓ_i = −∞ and counts for nothing; where no part has any, the result is 0, and never NaN.
"""

from __future__ import annotations

import torch

EMPTY = float("-inf")
"""The log of a sum of no exponentials."""


def reference(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`merge` in double precision, part by part. Shapes as there."""
    total = torch.zeros_like(outs[0], dtype=torch.float64)
    weight = torch.zeros_like(lses[0], dtype=torch.float64)
    largest = lses.double().amax(dim=0)
    largest = torch.where(largest == EMPTY, torch.zeros_like(largest), largest)
    for out, lse in zip(outs.double(), lses.double(), strict=True):
        share = (lse - largest).exp()
        total += torch.where(share > 0, share, 0.0)[..., None] * torch.nan_to_num(out)
        weight += share
    merged = torch.where(weight > 0, 1 / weight, 0.0)[..., None] * total
    return merged.float(), (largest + weight.log()).float()


def merge(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge parts that follow each other in the first dimension.

    Args:
        outs: [parts, …, dim], finite. In any floating dtype.
        lses: [parts, …], fp32; −∞ where a part has no visible key.

    Returns:
        The result [..., dim] and its log of the sum [...], both fp32.
    """
    largest = lses.amax(dim=0)
    base = largest.masked_fill(largest == EMPTY, 0.0)
    shares = (lses - base).exp_()
    weight = shares.sum(dim=0)
    shares = shares / weight.masked_fill(weight == 0, 1.0)
    merged = torch.einsum("p...,p...d->...d", shares, outs.float())
    return merged, base + weight.log()


class Merging:
    """A running result: parts are added as they become known.

    Args:
        out: [rows, …, dim], fp32: what is merged so far; written to.
        lse: [rows, …], fp32, likewise.
    """

    def __init__(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        self.out = out
        self.lse = lse

    @classmethod
    def of(cls, shape: tuple[int, ...], device: torch.device) -> Merging:
        """One that has seen nothing: shape is [rows, …, dim]."""
        lse = torch.full(shape[:-1], EMPTY, dtype=torch.float32, device=device)
        return cls(torch.zeros(shape, dtype=torch.float32, device=device), lse)

    def add(self, out: torch.Tensor, lse: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Add a part: [rows, …, dim] and [rows, …], for all rows, or for those that are named, each once."""
        before, known = (self.out, self.lse) if rows is None else (self.out[rows], self.lse[rows])
        largest = torch.maximum(known, lse)
        base = largest.masked_fill(largest == EMPTY, 0.0)
        old, new = (known - base).exp_(), (lse - base).exp_()
        weight = old + new
        scale = 1 / weight.masked_fill(weight == 0, 1.0)
        merged = torch.addcmul(before * (old * scale)[..., None], out.float(), (new * scale)[..., None])
        if rows is None:
            self.out, self.lse = merged, base + weight.log()
        else:
            self.out[rows], self.lse[rows] = merged, base + weight.log()
