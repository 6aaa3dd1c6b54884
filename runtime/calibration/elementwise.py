"""How fast a processor carries out what is neither product nor attention: norms, activations, rotations, copies."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Final

import torch
from torch.nn import functional

from ...scheduler.curves import Curve
from .sampling import Clock, Figure, curve, in_turns
from .timing import Timer

SIZES: Final = (2**12, 2**16, 2**18, 2**20, 2**22, 2**24)
"""Bytes of a tensor."""
SMALL: Final = 64
"""Elements of tensors that only show what starting the operations takes."""


class Mixture:
    """What a layer of a decoder does between its products, on tensors of one size.

    Args:
        nbytes: Of each tensor.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, nbytes: int) -> None:
        elements = max(nbytes // dtype.itemsize, SMALL)
        self._x, self._y = (torch.full((1, elements // 64, 64), 0.5, dtype=dtype, device=device) for _ in range(2))
        self._scale = torch.ones(64, dtype=dtype, device=device)
        self._itemsize = dtype.itemsize
        self._elements = self._x.numel()

    def run(self) -> None:
        """A norm, a rotation, an activation, a residual."""
        x, y = self._x, self._y
        wide = x.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(variance + 1e-6)
        x = self._scale * wide.to(x.dtype)
        turned = torch.cat((-x[..., 32:], x[..., :32]), dim=-1)
        z = (x * y) + (turned * y)
        z = functional.silu(z) * y
        z + self._x

    @property
    def nbytes(self) -> int:
        """Read and written by all operations, as programs count them."""
        narrow, wide = self._itemsize, 4
        # to: n+w; pow: 2w; mean: w; mul: 2w; to: w+n; mul by the scale: 2n; neg: n; cat: 2n; three products of two: 9n;
        # add: 3n; silu: 2n; add: 3n
        copied = narrow + wide if narrow != wide else 0
        return self._elements * (2 * copied + 5 * wide + 22 * narrow)


@torch.no_grad()
def elementwise_curve(
    device: torch.device, dtype: torch.dtype, *, seconds: float, timer: Timer, clock: Clock = perf_counter
) -> Curve:
    """Bytes per second by bytes of an operation's tensors, without what starting the operations takes.

    Args:
        device: What computes.
        seconds: About so long.
        timer: Of the device.
        clock: Seconds since any moment, for `seconds` only.
    """
    small = Mixture(device, dtype, SMALL * dtype.itemsize)
    mixtures = {nbytes: Mixture(device, dtype, nbytes) for nbytes in SIZES}

    def timed(mixture: Mixture) -> Callable[[], float]:
        mixture.run()
        return lambda: timer.seconds(mixture.run)

    found = in_turns(
        {0: timed(small), **{nbytes: timed(mixture) for nbytes, mixture in mixtures.items()}},
        seconds=seconds,
        clock=clock,
        pick=min,
    )
    started = found.pop(0).value
    rates = {
        3 * nbytes: Figure(
            value=mixtures[int(nbytes)].nbytes / max(each.value - started, each.value / 20), spread=each.spread
        )
        for nbytes, each in found.items()
    }
    return curve(rates)
