"""How fast a GPU reads and writes its own memory."""

from __future__ import annotations

from time import perf_counter

import torch

from ...scheduler.curves import Curve
from .sampling import Clock, curve, in_turns
from .timing import Timer


def device_memory_rate(
    device: torch.device, *, nbytes: int, seconds: float, timer: Timer, clock: Clock = perf_counter
) -> Curve:
    """Bytes per second of copying within the device, read and written both counted: one point.

    Args:
        device: A GPU.
        nbytes: Memory to use, more than its caches hold.
        seconds: About so long.
        timer: Of the device.
        clock: Seconds since any moment, for `seconds` only.
    """
    half = nbytes // 2
    source = torch.ones(half, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = 8  # starting one takes as long as copying some MiB

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    copy()
    return curve(in_turns({1: lambda: 2 * half * copies / timer.seconds(copy)}, seconds=seconds, clock=clock))
