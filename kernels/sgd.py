"""Stochastic gradient descent with momentum, with the bits of `torch.optim.SGD`.

The reference is torch's single-tensor implementation, which is the default on CPUs, on an fp32 master and a gradient
that was made fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from .optimizer import Optimizer, require
from .scratch import Scratch


@dataclass(frozen=True, kw_only=True)
class SGDHyper:
    """Hyperparameters of SGD.

    Raises:
        ValueError: one has no meaning.
    """

    lr: float = 1e-3
    momentum: float = 0.0
    """How much of the momentum each step keeps; 0 for none, and then no state is kept."""
    dampening: float = 0.0
    """How much of a gradient is kept out of the momentum, from the second step on."""
    weight_decay: float = 0.0
    """This times the weight is added to the gradient."""
    nesterov: bool = False
    """Whether a step looks ahead by one momentum."""

    def __post_init__(self) -> None:
        require("lr", self.lr)
        require("momentum", self.momentum)
        require("weight_decay", self.weight_decay)
        if not isinstance(self.dampening, int | float):
            raise ValueError(f"dampening is {self.dampening!r}; a number is needed")
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ValueError(
                f"nesterov with momentum {self.momentum} and dampening {self.dampening}: it needs a momentum above 0 "
                "and a dampening of 0"
            )


def states_of(hyper: SGDHyper) -> tuple[str, ...]:
    """The momentum, where there is one."""
    return ("momentum_buffer",) if hyper.momentum != 0 else ()


def update(
    master: torch.Tensor,
    states: Sequence[torch.Tensor],
    grad: torch.Tensor,
    hyper: SGDHyper,
    step: int,
    scratch: Scratch,
) -> None:
    """One sub-chunk; see `Rule`. The first step's gradient becomes the momentum as it is, without dampening."""
    if hyper.weight_decay != 0:
        grad = torch.add(grad, master, alpha=hyper.weight_decay, out=scratch.wide)
    if hyper.momentum != 0:
        (momentum,) = states
        if step == 1:
            momentum.copy_(grad)
        else:
            momentum.mul_(hyper.momentum).add_(grad, alpha=1 - hyper.dampening)
        grad = torch.add(grad, momentum, alpha=hyper.momentum, out=scratch.wide) if hyper.nesterov else momentum
    master.add_(grad, alpha=-hyper.lr)


SGD: Final = Optimizer(name="sgd", hyper=SGDHyper, states_of=states_of, rule=update)
