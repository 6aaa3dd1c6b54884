"""How many bytes of weights per second a product takes, by rows: torch's own linear, called as models call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from ...scheduler.curves import Curve
from .sampling import Clock, curve, in_turns
from .timing import Timer

ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
"""Those that models compute in. Whole numbers have no product in torch's linear."""
Multiply = Callable[[Tensor, Tensor], Tensor]
"""x [..., K] and a weight [N, K] → [..., N]."""
SAMPLE_S: Final = 0.01
"""A repetition should last so long."""
LONGEST_S: Final = 0.025
"""A product should not last longer: with many rows, smaller matrices show the same rate."""
LEAST_COLUMNS: Final = 128
"""Output features of the smallest matrix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Of the largest matrix."""

    outputs: int
    inputs: int


CPU_SHAPE: Final = Shape(outputs=2048, inputs=4096)
"""16 MiB in two bytes per weight: a layer of some billion parameters."""
GPU_SHAPE: Final = Shape(outputs=8192, inputs=8192)
"""128 MiB in two bytes per weight: reading it takes longer than starting the kernel, and no GPU's cache holds it."""


class Weights:
    """More weights than the caches hold, used in a circle, so that they come from memory as a model's do.

    Args:
        device: Where they lie.
        dtype: Theirs.
        nbytes: Of all of them.
        shape: Of one matrix; smaller where `nbytes` is.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, nbytes: int, shape: Shape) -> None:
        inputs = shape.inputs
        outputs = max(nbytes // (inputs * dtype.itemsize), LEAST_COLUMNS)
        # One tile over and over: drawing every number would take longer than measuring.
        tile = (torch.randn(1, inputs, device=device) * 0.02).to(dtype)
        self.all = torch.empty(outputs, inputs, dtype=dtype, device=device).copy_(tile.expand(outputs, inputs))
        self.largest = min(shape.outputs, outputs)
        self._at = 0

    def next(self, outputs: int) -> Tensor:
        """The next matrix of so many rows of weights."""
        if self._at + outputs > self.all.shape[0]:
            self._at = 0
        matrix = self.all[self._at : self._at + outputs]
        self._at += outputs
        return matrix

    def tokens(self, rows: int) -> Tensor:
        """Room for so many tokens that these weights can be multiplied with, one behind the other."""
        return torch.full((rows * self.all.shape[1],), 0.5, dtype=self.all.dtype, device=self.all.device)


class Product:
    """Products with so many rows, each with another matrix than the one before.

    Args:
        weights: Where matrices come from.
        tokens: Room for the rows.
        rows: Tokens that are multiplied with each matrix.
        timer: Of the device.
        multiply: How; as models do it, if not said otherwise.
    """

    def __init__(
        self, weights: Weights, tokens: Tensor, rows: int, timer: Timer, multiply: Multiply | None = None
    ) -> None:
        self._weights = weights
        self._multiply = multiply or functional.linear
        # A part of a larger [1, rows, inputs] would keep its first stride, for which some of torch's kernels are 60
        # times slower, though it is as contiguous as this one.
        inputs = weights.all.shape[1]
        self._x = tokens[: rows * inputs].view(1, rows, inputs)
        self._timer = timer
        self._outputs = min(LEAST_COLUMNS, weights.largest)
        self._calls = 1
        self.once()  # the first of a shape chooses its kernel
        self._outputs = self._fitting(self.once())
        self.once()
        self._calls = max(1, min(round(SAMPLE_S * self.once() / self._nbytes()), 1000))

    def once(self) -> float:
        """Bytes of weights per second of one repetition."""
        return self._calls * self._nbytes() / self._timer.seconds(self._repeat)

    def _fitting(self, rate: float) -> int:
        """Output features of the largest matrix whose product does not last too long."""
        per_output = self._weights.all.shape[1] * self._weights.all.dtype.itemsize
        fitting = int(LONGEST_S * rate / per_output) // LEAST_COLUMNS * LEAST_COLUMNS
        return max(min(fitting, self._weights.largest), min(LEAST_COLUMNS, self._weights.largest))

    def _nbytes(self) -> int:
        return self._outputs * self._weights.all.shape[1] * self._weights.all.dtype.itemsize

    def _repeat(self) -> None:
        for _ in range(self._calls):
            self._multiply(self._x, self._weights.next(self._outputs))


@torch.no_grad()
def linear_curve(
    device: torch.device,
    dtype: torch.dtype,
    *,
    nbytes: int,
    seconds: float,
    timer: Timer,
    clock: Clock = perf_counter,
    rows: Sequence[int] = ROWS,
    shape: Shape | None = None,
    multiply: Multiply | None = None,
) -> Curve:
    """Bytes of weights per second by rows.

    Args:
        device: What computes.
        dtype: Of weights and activations.
        nbytes: Of weights, more than the caches hold. Activations and results come on top: at most 64 MiB.
        seconds: About so long.
        timer: Of the device.
        clock: Seconds since any moment, for `seconds` only.
        rows: Tokens that are multiplied with the same weights.
        shape: Of the largest matrix; by the device if None.
        multiply: How; as models do it, if not said otherwise.

    Raises:
        RuntimeError: this torch cannot multiply that dtype here.
    """
    largest = shape or (GPU_SHAPE if device.type == "cuda" else CPU_SHAPE)
    weights = Weights(device, dtype, nbytes, largest)
    tokens = weights.tokens(max(rows))
    points: dict[float, Callable[[], float]] = {n: Product(weights, tokens, n, timer, multiply).once for n in rows}
    return curve(in_turns(points, seconds=seconds, clock=clock, pick=max))


def one_row(device: torch.device, dtype: torch.dtype, *, nbytes: int, timer: Timer) -> Callable[[], float]:
    """A repetition of products of one row, as decoding does them: bytes of weights per second."""
    with torch.no_grad():
        weights = Weights(device, dtype, nbytes, GPU_SHAPE if device.type == "cuda" else CPU_SHAPE)
        product = Product(weights, weights.tokens(1), 1, timer)

    def once() -> float:
        with torch.no_grad():  # of the thread that calls
            return product.once()

    return once
