"""What a layer costs on a machine, for systems that are written in plain PyTorch.

Two constants for such code, both from FlexGen's fit of its own runs on a T4 (experimental/cost_model.py):

* Attention reads the cache at 79 GB/s at decode, where the memory reaches 221: it is copied once before it is read
  (concatenated, permuted), which makes three passes. Where key-value heads are shared, the copy is expanded too.
* The link copies 12.89 GiB/s from pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..cost import CostModel
from ..hardware import Hardware, Where
from ..modelshape import Layer, ModelShape, Role
from ..operations import Operation

GIB = 2**30

PAGEABLE = 5.95e9
"""Bytes per second from pageable memory, where the machine's own rate is not known. From accelerate's benchmark:
14.1 GB of OPT-30B per token in 2.37 s."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of the parts of one layer, on average over all layers."""

    hardware: Hardware
    model: ModelShape

    @cached_property
    def cost(self) -> CostModel:
        """The machine's cost model."""
        return CostModel(hardware=self.hardware)

    def products(self, tokens: float, where: Where = "gpu", roles: Sequence[Role] = ()) -> float:
        """Products of a layer with so many tokens; of some roles only, where given."""
        return self._mean(
            lambda layer: [
                operation
                for matrix, operation in zip(layer.matrices, self.model.linear(layer, tokens), strict=True)
                if not roles or matrix.role in roles
            ],
            where,
        )

    def elementwise(self, tokens: float, where: Where = "gpu") -> float:
        """Norms, activations and sums of a layer."""
        return self.cost.operation_s(self.model.elementwise(tokens), where)

    def attention(
        self, sequences: float, queries: float, context: float, where: Where = "gpu", *, eager: bool = True
    ) -> float:
        """Attention of a layer. eager: written as single operations, that copy the cache before they read it."""
        operation = self.model.attention(sequences, queries, context)
        if not eager or where == "cpu":
            return self.cost.operation_s(operation, where)
        expanded = self.model.heads / self.model.kv_heads
        passes = 2.0 + (1 + expanded if expanded > 1 else 0)
        copies = Operation(kind="memory", nbytes=operation.nbytes * passes, launches=4)
        read = Operation(
            kind="attention",
            nbytes=operation.nbytes * expanded,
            rows=queries,
            dtype=operation.dtype,
            launches=operation.launches,
        )
        if queries > 1:  # a prompt: nothing to concatenate with, and arithmetic counts
            return self.cost.operation_s(read, where)
        return self.cost.compute_s([copies, read], where)

    def layer(self, sequences: float, queries: float, context: float, *, eager: bool = True) -> float:
        """A whole layer on the device."""
        tokens = sequences * queries
        return (
            self.products(tokens) + self.attention(sequences, queries, context, eager=eager) + self.elementwise(tokens)
        )

    def head(self, tokens: float, where: Where = "gpu") -> float:
        """The output projection."""
        return self.cost.operation_s(self.model.head(tokens), where)

    def disk_rate(self) -> float:
        """Bytes per second of large reads from all drives; 0 without any."""
        return self.hardware.disk_read

    def pinned_rate(self) -> float:
        """Bytes per second to the device, from pinned memory."""
        assert self.hardware.link is not None, "systems ask for the device first"
        return self.hardware.link.h2d.best

    def pageable_rate(self) -> float:
        """The same from pageable memory."""
        assert self.hardware.link is not None, "systems ask for the device first"
        known = self.hardware.link.h2d_pageable
        return known.best if known is not None else min(PAGEABLE, self.pinned_rate())

    def _mean(self, operations: Callable[[Layer], list[Operation]], where: Where) -> float:
        total = sum(layer.count * self.cost.compute_s(operations(layer), where) for layer in self.model.layers)
        return total / self.model.depth


def role_share(model: ModelShape, *roles: Role) -> float:
    """What of a layer's weights is in matrices of some roles, on average."""
    held = sum(
        layer.count * matrix.parameters for layer in model.layers for matrix in layer.matrices if matrix.role in roles
    )
    return held / model.layer_parameters
