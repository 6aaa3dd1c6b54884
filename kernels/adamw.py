"""AdamW (Loshchilov and Hutter 2019), with the bits of `torch.optim.AdamW`.

The reference is torch's single-tensor implementation, which is the default on CPUs, on an fp32 master and a gradient
that was made fp32. Its fused kernel contracts products and sums: it differs in the last bit, and is not used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from .optimizer import Optimizer, require, require_betas
from .scratch import Scratch


@dataclass(frozen=True, kw_only=True)
class AdamWHyper:
    """Hyperparameters of AdamW.

    Raises:
        ValueError: one has no meaning.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    """How much of the averages of the gradient and of its square each step keeps."""
    eps: float = 1e-8
    """Added to the root of the averaged square."""
    weight_decay: float = 1e-2
    """Each step takes lr · weight_decay of a weight, apart from the gradient."""

    def __post_init__(self) -> None:
        require("lr", self.lr)
        require("eps", self.eps)
        require("weight_decay", self.weight_decay)
        require_betas(self.betas, "(0.9, 0.999)")


def update(
    master: torch.Tensor,
    states: Sequence[torch.Tensor],
    grad: torch.Tensor,
    hyper: AdamWHyper,
    step: int,
    scratch: Scratch,
) -> None:
    """One sub-chunk; see `Rule`. Bias corrections are made in Python's floats, as torch makes them."""
    exp_avg, exp_avg_sq = states
    beta1, beta2 = hyper.betas
    if hyper.weight_decay != 0:
        master.mul_(1 - hyper.lr * hyper.weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    torch.sqrt(exp_avg_sq, out=scratch.work).div_(correction2**0.5).add_(hyper.eps)
    master.addcdiv_(exp_avg, scratch.work, value=-(hyper.lr / correction1))


ADAMW: Final = Optimizer(name="adamw", hyper=AdamWHyper, states_of=lambda _: ("exp_avg", "exp_avg_sq"), rule=update)
