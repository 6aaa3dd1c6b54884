"""How many elements per second AdamW updates with states in fp32: the best of torch's ways to do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final

import torch

from ...memory.errors import PenstockError
from .sampling import Clock, Figure, in_turns
from .timing import Timer

TENSORS: Final = 4
GPU_STEPS: Final = 8
"""In a repetition: the host has to run ahead of the GPU, or what is measured is Python."""
NBYTES_PER_ELEMENT: Final = 24
"""Parameter, gradient, two moments; and what a way that goes operation by operation needs besides."""
WAYS: Final = ("fused", "foreach", "single")
"""The last one is tried only where both others are refused: it is never faster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamRate:
    """The best way."""

    elements: Figure
    """Per second."""
    way: str
    """One of `WAYS`."""


Make = Callable[[Sequence[torch.Tensor], str], torch.optim.Optimizer]


def torch_adamw(parameters: Sequence[torch.Tensor], way: str) -> torch.optim.Optimizer:
    """torch's AdamW, carried out in one of its ways."""
    how: dict[str, Any] = {"fused": {"fused": True}, "foreach": {"foreach": True}, "single": {"foreach": False}}[way]
    return torch.optim.AdamW(list(parameters), lr=1e-4, **how)


def adam_rate(
    device: torch.device,
    *,
    nbytes: int,
    seconds: float,
    timer: Timer,
    clock: Clock = perf_counter,
    ways: Sequence[str] = WAYS,
    make: Make = torch_adamw,
) -> AdamRate:
    """Measure the ways one after the other, since their states would not fit beside each other.

    Args:
        device: Where states lie and are updated.
        nbytes: Memory to use, more than the caches hold.
        seconds: About so long.
        timer: Of the device.
        clock: Seconds since any moment, for `seconds` only.
        ways: To try.
        make: Makes an optimizer over parameters in one way.

    Raises:
        PenstockError: none of the ways works here.
    """
    each = max(nbytes // (NBYTES_PER_ELEMENT * TENSORS), 1024)
    found: list[AdamRate] = []
    refused = []
    steps = GPU_STEPS if device.type == "cuda" else 1

    def once(optimizer: torch.optim.Optimizer) -> float:
        def work() -> None:
            for _ in range(steps):
                optimizer.step()

        return steps * each * TENSORS / timer.seconds(work)

    for way in ways:
        if way == "single" and found:
            break
        parameters = [torch.zeros(each, device=device) for _ in range(TENSORS)]
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = torch.full_like(parameter, 0.01)

        try:
            optimizer = make(parameters, way)
            optimizer.step()  # makes the states, and touches them
            measured = in_turns({1: lambda o=optimizer: once(o)}, seconds=seconds / len(ways), clock=clock)  # type: ignore[misc]
        except (RuntimeError, NotImplementedError) as error:  # this torch has no such kernel for this device
            refused.append(f"{way}: {error}")
            continue
        found.append(AdamRate(elements=measured[1], way=way))
    if not found:
        raise PenstockError(f"AdamW runs in no way on {device}: {'; '.join(refused)}")
    return max(found, key=lambda rate: rate.elements.value)
