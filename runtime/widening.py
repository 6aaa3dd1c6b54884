"""Products of many rows on a CPU without instructions for bf16 or fp16: in fp32 where that is measured to be faster.

Only runs whose results are equal to rounding anyway take it: many prompts in one sweep, whose shapes are not those of a
single prompt. The kernel and its bound are in `kernels/linear_wide.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from ..kernels.linear_wide import DTYPES, PIECE_NBYTES, WideLinear
from ..scheduler.curves import Curve
from .calibration.products import CPU_SHAPE, Shape, linear_curve
from .calibration.timing import host_timer
from .intercept import is_linear

ROWS: Final = (1, 8, 16, 32, 64, 512)
GAIN: Final = 1.2
"""How much faster fp32 must be, so that one run does not decide otherwise than the next."""
NBYTES: Final = 64 * 2**20
"""Of weights that are multiplied with to measure: more than caches hold."""
SECONDS: Final = 1.0
"""For each of the two ways."""
LANE_NBYTES: Final = 3 * PIECE_NBYTES
"""That each lane which multiplies in fp32 keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Products:
    """What products on this CPU take, the faster way of two."""

    rates: Curve
    """Bytes of weights per second by rows."""
    wide_from: int | None = None
    """Rows from which fp32 is the faster way; None where it never is."""


def measuring_nbytes(dtype: torch.dtype, inputs: int) -> int:
    """What `measure_products` takes: the weights, the buffers, and the most rows of activations with their products."""
    return NBYTES + LANE_NBYTES + ROWS[-1] * (inputs + CPU_SHAPE.outputs) * dtype.itemsize


def measure_products(dtype: torch.dtype, inputs: int) -> Products:
    """Measure the CPU, in some seconds and `measuring_nbytes`: the run that is decided by it takes minutes.

    Args:
        dtype: Of the model.
        inputs: Of most of its weights: kernels are up to twice as fast for one number as for another.
    """
    device = torch.device("cpu")
    timer = host_timer(device)
    shape = Shape(outputs=CPU_SHAPE.outputs, inputs=inputs)
    plain = linear_curve(device, dtype, nbytes=NBYTES, seconds=SECONDS, timer=timer, rows=ROWS, shape=shape)
    if dtype not in DTYPES:
        return Products(rates=plain)
    wide = linear_curve(
        device, dtype, nbytes=NBYTES, seconds=SECONDS, timer=timer, rows=ROWS[1:], shape=shape, multiply=WideLinear()
    )
    return faster_of(plain, wide)


def faster_of(plain: Curve, wide: Curve) -> Products:
    """The two ways by their rates: fp32 from the number of rows on above which it is never the slower one."""
    wide_from = None
    rows = int(max(plain.x[-1], wide.x[-1]))
    while rows >= wide.x[0] and wide.at(rows) >= GAIN * plain.at(rows):
        wide_from = rows
        rows //= 2
    if wide_from is None:
        return Products(rates=plain)
    points = sorted({*plain.x, float(wide_from), wide_from - 0.5})
    best = {x: wide.at(x) if x >= wide_from else plain.at(x) for x in points}
    return Products(rates=Curve.through(best.items()), wide_from=wide_from)


class Widening(TorchFunctionMode):
    """While entered, linear layers of this thread with so many rows or more are multiplied in fp32.

    Weights that are away, or served by rows, are left to those who bring them.

    Args:
        rows: From how many on.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self._multiply = WideLinear()
        self.multiplied = 0
        """Products so far."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Carry out a call, in fp32 if it is a product of many rows."""
        named = dict(kwargs or {})
        if is_linear(func):
            x, weight, bias = _operands(*args, **named)
            if self._takes(x, weight):
                self.multiplied += 1
                return self._multiply(x, weight, bias)
        return func(*args, **named)

    def _takes(self, x: Any, weight: Any) -> bool:
        return (
            type(weight) in (torch.nn.Parameter, torch.Tensor)
            and x.dtype == weight.dtype
            and x.dtype in DTYPES
            and x.device.type == weight.device.type == "cpu"
            and x.numel() >= self._rows * weight.shape[-1]
            and weight.dim() == 2
            and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
            and not torch.is_autocast_enabled("cpu")
        )


def _operands(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    """Those of `functional.linear`, by its own names."""
    return input, weight, bias
