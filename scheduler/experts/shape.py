"""What one expert is, as figures: its bytes, and the operations of a call with so many rows."""

from __future__ import annotations

import msgspec

from ...memory.errors import UsageError
from ..hardware import Dtype
from ..modelshape import ITEMSIZE, ModelShape
from ..operations import Operation


class ExpertShape(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of an expert; all experts of a model are alike."""

    hidden: int
    """Values of a token that goes in, and of one that comes out."""
    ffn: int
    """Values between the two products."""
    gated: bool = True
    """Three matrices: gate and up, which are multiplied at once, and down. Else two."""
    dtype: Dtype = "bfloat16"

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.ffn < 1:
            raise UsageError(f"an expert of {self.hidden} × {self.ffn} values: both must be 1 or more")
        if self.dtype not in ITEMSIZE:
            raise UsageError(f"experts of dtype {self.dtype!r}: it is one of {', '.join(ITEMSIZE)}")

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Of one expert."""
        return (3 if self.gated else 2) * self.hidden * self.ffn * self.itemsize

    @property
    def row_nbytes(self) -> int:
        """Of the activations of one token, on their way to another processor."""
        return self.hidden * self.itemsize

    def operations(self, rows: float) -> tuple[Operation, ...]:
        """What a call with so many tokens computes: the first product, what lies between, the second product."""
        matrix = self.hidden * self.ffn * self.itemsize
        wide = 2 if self.gated else 1
        return (
            Operation(kind="linear", nbytes=wide * matrix, rows=rows, dtype=self.dtype),
            # Reads the first product, writes what goes into the second.
            Operation(kind="memory", nbytes=rows * (wide + 1) * self.ffn * self.itemsize, dtype=self.dtype),
            Operation(kind="linear", nbytes=matrix, rows=rows, dtype=self.dtype),
        )


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    """How a model chooses experts."""

    layers: int
    """Those that have experts."""
    experts: int
    """Of a layer."""
    top_k: int
    """Experts that a token uses in each layer."""

    def __post_init__(self) -> None:
        if self.layers < 1 or not 1 <= self.top_k <= self.experts or self.experts > MOST_EXPERTS:
            raise UsageError(
                f"{self.layers} layers of {self.experts} experts, {self.top_k} per token: there must be a layer, 1 to "
                f"{MOST_EXPERTS} experts, and a token can use 1 to all of them"
            )

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return self.layers * self.experts


MOST_EXPERTS = 2**15
"""Of a layer. Their numbers, and one more that stands for none, have 16 bits in a trace."""


def experts_of(model: ModelShape) -> tuple[Routing, ExpertShape]:
    """The experts of a model whose shape is known.

    Raises:
        UsageError: it has none, or its layers have experts of several kinds.
    """
    found = {}
    layers = 0
    for layer in model.layers:
        matrices = [matrix for matrix in layer.matrices if matrix.role == "expert"]
        if not matrices:
            continue
        down = next((matrix for matrix in matrices if matrix.name == "down"), matrices[-1])
        gated = sum(matrix.outputs for matrix in matrices if matrix is not down) > down.inputs
        shape = ExpertShape(hidden=down.outputs, ffn=down.inputs, gated=gated, dtype=model.dtype)
        found[down.copies, down.used, shape] = layer
        layers += layer.count
    if not found:
        raise UsageError(f"{model.name} has no experts: a mixture-of-experts model is needed")
    if len(found) > 1:
        raise UsageError(f"{model.name} has experts of {len(found)} kinds; all layers must have the same")
    ((experts, used, shape),) = found
    return Routing(layers=layers, experts=experts, top_k=used), shape
