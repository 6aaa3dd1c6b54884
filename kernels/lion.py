"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", Program 1): the sign of an interpolation.

torch has no Lion. The order of operations is that of the algorithm as published by its authors: decay, update, average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from .optimizer import Optimizer, require, require_betas
from .scratch import Scratch


@dataclass(frozen=True, kw_only=True)
class LionHyper:
    """Hyperparameters of Lion. Its authors take a third to a tenth of AdamW's lr, and as much more weight decay.

    Raises:
        ValueError: one has no meaning.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    """How much of the average the update takes, and how much of it a step keeps."""
    weight_decay: float = 0.0
    """Each step takes lr · weight_decay of a weight, apart from the gradient."""

    def __post_init__(self) -> None:
        require("lr", self.lr)
        require("weight_decay", self.weight_decay)
        require_betas(self.betas, "(0.9, 0.99)")


def update(
    master: torch.Tensor,
    states: Sequence[torch.Tensor],
    grad: torch.Tensor,
    hyper: LionHyper,
    step: int,
    scratch: Scratch,
) -> None:
    """One sub-chunk; see `Rule`. Every step is the same: there is no bias to correct."""
    (exp_avg,) = states
    beta1, beta2 = hyper.betas
    if hyper.weight_decay != 0:
        master.mul_(1 - hyper.lr * hyper.weight_decay)
    direction = torch.mul(exp_avg, beta1, out=scratch.work).add_(grad, alpha=1 - beta1).sign_()
    master.add_(direction, alpha=-hyper.lr)
    exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)


LION: Final = Optimizer(name="lion", hyper=LionHyper, states_of=lambda _: ("exp_avg",), rule=update)
