"""Linear layers of operands that torch does not lay flat: sample by sample, without a copy of the weight for each.

y[i] = x[i] Wᵀ for every sample i. Where the leading dimensions of x do not lie one after another (the last position of
every sequence, which is what a language model's head is given after a prompt), torch multiplies batch by batch with an
expanded weight. Its bf16 kernel for CPUs wants that weight contiguous, so that it is copied and transposed once per
sample: 8 samples and a head of 156 MiB take 1.25 GiB and 4 s. A product per sample reads the weight as it lies and adds
up alike; `copies_agree` shows it, on this CPU and at the shape in question.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional

FEW: Final = 64
"""Rows at which torch's own path, copies included, is compared with what is taken for it."""


def copies_weight(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `functional.linear(x, weight, bias)` makes one copy of the weight per sample, as `at::matmul` decides it.

    Shapes: x [..., S, K], weight [N, K].
    """
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or x.dim() < 3 or not x.numel() or weight.requires_grad:
        return False
    return not is_laid_flat(x, bias)


def is_laid_flat(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether torch takes x [..., S, K] as one matrix by itself. Strides count, those of dimensions of 1 too."""
    if bias is not None and x.is_contiguous():
        return True
    return all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2))


def linear_by_sample(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., S, K] and weight [N, K] → [..., S, N]; a bias [N] is added to the rounded product, as torch does it."""
    samples = x.reshape(-1, *x.shape[-2:])
    made = torch.stack([functional.linear(sample, weight) for sample in samples])
    if bias is not None:
        made += bias
    return made.view(*x.shape[:-1], weight.shape[0])


def copies_agree(x: torch.Tensor, transposed: torch.Tensor, piece_rows: int) -> bool:
    """Whether products by sample, and of pieces of rows, have the bits of torch's product with copies.

    The first and the last sample are compared.

    Args:
        x: [..., S, K], the operand.
        transposed: [B, K, N], contiguous: what torch would make of the weight, for the B samples of x.
        piece_rows: Rows of a piece of the weight.
    """
    samples, rows = x.reshape(-1, *x.shape[-2:]), transposed.shape[-1]
    few = transposed[0, :, :FEW].t().contiguous()
    copies = few.t().expand(len(samples), -1, -1).contiguous()
    if not torch.equal(functional.linear(x, few).view(len(samples), x.shape[-2], -1), torch.bmm(samples, copies)):
        return False  # torch takes another path than it is thought to
    whole = torch.bmm(samples, transposed)
    for start in range(0, rows, piece_rows):
        stop = min(start + piece_rows, rows)
        for index in {0, len(samples) - 1}:
            piece = transposed[index, :, start:stop].t().contiguous()
            if not torch.equal(functional.linear(samples[index], piece), whole[index, :, start:stop]):
                return False
    return True
