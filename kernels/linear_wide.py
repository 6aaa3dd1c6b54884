"""Linear layers of bf16 or fp16 operands on a CPU that has no instructions for them: in fp32, piece by piece.

y = x Wᵀ + b. Without AVX512-BF16 or AMX, oneDNN's bf16 kernels take each pair of numbers apart as they go, three to
four times slower than its fp32 ones for many rows. Here a piece of W is made fp32 once, in a buffer that stays in the
cache, and multiplied with all rows. Products of two such numbers are exact in fp32 and sums are rounded once, at the
end, as oneDNN does it; only the order of summation differs. So results equal torch's to the rounding of the dtype, plus
that of a sum in fp32: |error| ≤ u·|y| + K·2⁻²⁴·Σ|x·w|, where u is 2⁻⁸ for bf16 and 2⁻¹¹ for fp16.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional

DTYPES: Final = (torch.bfloat16, torch.float16)
PIECE_NBYTES: Final = 8 << 20
"""Of a piece of the weight in fp32, and of its products: what fits the last cache need not be read again."""
GRAIN: Final = 16
"""Rows of the weight in a piece are a multiple of this: whole tiles of the kernels."""
TURNED_ROWS: Final = range(12, 49)
TURNED_COLUMNS: Final = 512
"""Where the product is made as W xᵀ: so few rows, and pieces of so many columns or more. MKL shares the work out by the
rows of the left operand; x Wᵀ of 16 to 42 rows and 4096 inputs took 1.7 to 2 times as long on two cores of a Xeon with
AVX-512, while with pieces of fewer columns, and with more rows, it was the faster one."""


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product in double precision, rounded once. Shapes: x [..., K], weight [N, K], bias [N]; result [..., N]."""
    return functional.linear(x.double(), weight.double(), None if bias is None else bias.double()).to(x.dtype)


class WideLinear:
    """Multiplies with buffers that are made once and grow when they must, to three times PIECE_NBYTES at the most where
    weights have less than 2¹⁷ columns. One per thread: it is not to be shared."""

    def __init__(self) -> None:
        self._x = torch.empty(0, dtype=torch.float32)
        self._piece = torch.empty(0, dtype=torch.float32)
        self._part = torch.empty(0, dtype=torch.float32)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._x.nbytes + self._piece.nbytes + self._part.nbytes

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] of one of DTYPES, weight [N, K] and bias [N] of the same → [..., N]. No gradient is recorded."""
        outputs, inputs = weight.shape
        narrow_x = x.detach().reshape(-1, inputs)
        rows = narrow_x.shape[0]
        made = torch.empty(rows, outputs, dtype=x.dtype)
        most = min(max(PIECE_NBYTES // (4 * max(inputs, 1)), GRAIN), max(rows, 1))
        widest = PIECE_NBYTES // (4 * max(inputs, most))  # neither the piece nor its products are to be larger
        step = min(max(widest // GRAIN * GRAIN, GRAIN), outputs)
        self._x = _room(self._x, most * inputs)
        self._piece = _room(self._piece, step * inputs)
        self._part = _room(self._part, most * step)
        turned = rows in TURNED_ROWS and step >= TURNED_COLUMNS
        for start in range(0, outputs, step):
            columns = slice(start, min(start + step, outputs))
            piece = _filled(self._piece, weight.detach()[columns])
            for first in range(0, rows, most):
                some = narrow_x[first : first + most]
                wide_x = self._x[: some.numel()].view(some.shape)
                if rows > most or not start:  # all rows at once are widened once
                    wide_x.copy_(some)
                part = self._product(wide_x, piece, turned=turned)
                if bias is not None:
                    part += bias.detach()[columns]
                made[first : first + most, columns] = part
        return made.view(*x.shape[:-1], outputs)

    def _product(self, x: torch.Tensor, piece: torch.Tensor, *, turned: bool) -> torch.Tensor:
        """x Wᵀ of a piece, in its buffer: [rows, columns]."""
        rows, columns = x.shape[0], piece.shape[0]
        room = self._part[: rows * columns]
        if turned:
            return torch.mm(piece, x.t(), out=room.view(columns, rows)).t()
        return torch.mm(x, piece.t(), out=room.view(rows, columns))


def _filled(room: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return room[: values.numel()].view(values.shape).copy_(values)


def _room(held: torch.Tensor, elements: int) -> torch.Tensor:
    return held if held.numel() >= elements else torch.empty(elements, dtype=torch.float32)
