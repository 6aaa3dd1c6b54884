"""What starting one small operation takes, and what calling one module adds: Python, dispatch, launch."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Final

import torch
from torch import nn

from .sampling import Clock, Figure, in_turns
from .timing import Timer

CALLS: Final = 1000
"""In one repetition. A GPU's queue holds about as many, so that the host is not held up by it."""
ELEMENTS: Final = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchCost:
    """Seconds, one after the other without an end."""

    operation: Figure
    module: Figure
    """Beyond what it computes."""


class _Passes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@torch.no_grad()
def launch_cost(
    device: torch.device, *, seconds: float, timer: Timer, clock: Clock = perf_counter, calls: int = CALLS
) -> LaunchCost:
    """Measure small operations and empty modules in turns.

    Args:
        device: What computes.
        seconds: About so long.
        timer: By the host's clock; on a GPU until it has come to rest.
        clock: Seconds since any moment, for `seconds` only.
        calls: In one repetition.
    """
    x = torch.ones(ELEMENTS, device=device)
    module = _Passes()

    def operations() -> None:
        for _ in range(calls):
            x + x

    def modules() -> None:
        for _ in range(calls):
            module(x)

    operations()
    modules()
    found = in_turns(
        {1: lambda: timer.seconds(operations) / calls, 2: lambda: timer.seconds(modules) / calls},
        seconds=seconds,
        clock=clock,
        pick=min,
    )
    return LaunchCost(operation=found[1], module=found[2])
