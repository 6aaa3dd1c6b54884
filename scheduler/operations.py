"""What a model computes, as figures: operations with their bytes and rows, without tensors."""

from __future__ import annotations

from typing import Literal

import msgspec

from .hardware import Dtype

OperationKind = Literal["linear", "attention", "attention back", "memory", "adam"]


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One operation, or several alike that follow each other."""

    kind: OperationKind
    """linear: a product with weights. attention: queries with the keys and values of a cache. attention back: its
    backward. memory: everything that
    only reads and writes (norms, activations, lookups, copies). adam: an optimizer's step."""
    nbytes: float
    """linear: of weights. attention: of keys and values. memory: read and written. adam: elements."""
    rows: float = 1.0
    """linear: tokens. attention: queries times heads per key-value head. Otherwise of no meaning."""
    dtype: Dtype = "float32"
    launches: int = 1
    """How many operations the host starts for it."""
