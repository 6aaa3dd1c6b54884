"""What a layer costs on a machine, for systems that are written in plain PyTorch.

Two constants for such code, both from FlexGen's fit of its own runs on a T4 (experimental/cost_model.py):

* Attention reads the cache at 79 GB/s at decode, where the memory reaches 221: it is copied once before it is read
  (concatenated, permuted), which makes three passes. Where key-value heads are shared, the copy is expanded too.
* The link copies 12.89 GiB/s from pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from msgspec.structs import replace

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

    def seconds(self, operations: Iterable[Operation], where: Where = "gpu") -> float:
        """Of operations in a row. The host starts those of a GPU ahead, so that only the longer of both counts."""
        found = list(operations)
        if where == "cpu" or self.hardware.gpu is None:
            return self.cost.compute_s(found, where)
        started = sum(each.launches for each in found) * self.hardware.gpu.launch_s
        return max(started, sum(self.cost.operation_s(replace(each, launches=0), where) for each in found))

    def mean(self, operations: Callable[[Layer], list[Operation]], where: Where = "gpu") -> float:
        """Seconds of what a layer does, on average over all of them."""
        total = sum(layer.count * self.seconds(operations(layer), where) for layer in self.model.layers)
        return total / self.model.depth

    def products(self, layer: Layer, tokens: float, roles: Sequence[Role] = ()) -> list[Operation]:
        """Products of a layer with so many tokens; of some roles only, where given."""
        found = zip(layer.matrices, self.model.linear(layer, tokens), strict=True)
        return [operation for matrix, operation in found if not roles or matrix.role in roles]

    def attention(self, sequences: float, queries: float, context: float, *, eager: bool = True) -> list[Operation]:
        """Attention of a layer. eager: written as single operations, that copy the cache before they read it."""
        operation = self.model.attention(sequences, queries, context)
        if not eager:
            return [operation]
        expanded = self.model.heads / self.model.kv_heads
        read = replace(operation, nbytes=operation.nbytes * expanded, rows=queries)
        if queries > 1:  # a prompt: nothing to concatenate with, and arithmetic counts
            return [read]
        passes = 2.0 + (1 + expanded if expanded > 1 else 0)
        return [Operation(kind="memory", nbytes=operation.nbytes * passes, launches=4), read]

    def layer(self, sequences: float, queries: float, context: float, *, eager: bool = True) -> float:
        """A whole layer on the device."""
        tokens = sequences * queries
        rest = [*self.attention(sequences, queries, context, eager=eager), self.model.elementwise(tokens)]
        return self.mean(lambda layer: [*self.products(layer, tokens), *rest])

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

    def back_rate(self) -> float:
        """Bytes per second from the device, to pinned memory."""
        assert self.hardware.link is not None, "systems ask for the device first"
        return self.hardware.link.d2h.best

    def pageable_rate(self) -> float:
        """Bytes per second to the device, from pageable memory."""
        assert self.hardware.link is not None, "systems ask for the device first"
        known = self.hardware.link.h2d_pageable
        return known.best if known is not None else min(PAGEABLE, self.pinned_rate())


def role_share(model: ModelShape, *roles: Role) -> float:
    """What of a layer's weights is in matrices of some roles, on average."""
    held = sum(
        layer.count * matrix.parameters for layer in model.layers for matrix in layer.matrices if matrix.role in roles
    )
    return held / model.layer_parameters
