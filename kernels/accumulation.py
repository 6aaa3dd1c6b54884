"""Gradients of several backward passes, summed in fp32."""

from __future__ import annotations

import torch

from .optimizer import GRADIENT_DTYPES
from .scratch import Scratch


def reference(total: torch.Tensor, grad: torch.Tensor, *, first: bool) -> None:
    """What `accumulate` reproduces, with a temporary of the gradient's length."""
    if first:
        total.copy_(grad)
    else:
        total.add_(grad.float())


def accumulate(total: torch.Tensor, grad: torch.Tensor, *, first: bool, scratch: Scratch) -> None:
    """Add a gradient into a sum, in place. One pass: 4 bytes per element and the gradient's are read, 4 are written.

    Allocates no memory for elements. May be called from any thread, with a `Scratch` of that thread's own.

    Args:
        total: fp32 [n], contiguous.
        grad: bf16, fp16 or fp32 [n], contiguous; not changed.
        first: Whether nothing was added yet: the gradient is copied, whatever `total` holds.
        scratch: The calling thread's.

    Raises:
        ValueError: lengths or dtypes do not fit.
    """
    if total.dtype != torch.float32 or grad.dtype not in GRADIENT_DTYPES:
        raise ValueError(f"{grad.dtype} into {total.dtype}: sums are fp32, gradients bf16, fp16 or fp32")
    if total.dim() != 1 or total.shape != grad.shape or not (total.is_contiguous() and grad.is_contiguous()):
        raise ValueError(
            f"a gradient {list(grad.shape)} into a sum {list(total.shape)}: both must be flat, contiguous and as long"
        )
    with torch.no_grad():
        size = scratch.elements
        for here, part in zip(torch.split(total, size), torch.split(grad, size), strict=True):
            if first:
                here.copy_(part)
            else:
                here.add_(part if part.dtype == torch.float32 else scratch.first(len(part)).wide.copy_(part))
