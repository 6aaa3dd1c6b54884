"""Results of modules that are views of weights, which are about to leave."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .operands import storage_address


def aliases(result: Any, base: int) -> bool:
    """Whether a result of a torch call shares the memory of the arena that starts at `base`."""
    values = result if isinstance(result, tuple | list) else (result,)
    return any(isinstance(value, torch.Tensor) and storage_address(value) == base for value in values)


def without_views(result: Any, base: int) -> Any:
    """A module's result with fresh copies in the place of views of its weights, which lie in the arena at `base`."""
    if isinstance(result, torch.Tensor):
        if isinstance(result, nn.Parameter) or not aliases(result, base):
            return result
        return result.clone()
    if type(result) is tuple or type(result) is list:
        found = [without_views(value, base) for value in result]
        same = all(a is b for a, b in zip(found, result, strict=True))
        return result if same else type(result)(found)
    if isinstance(result, dict):  # transformers' outputs are dicts too
        for key, value in result.items():
            fresh = without_views(value, base)
            if fresh is not value:
                result[key] = fresh
    return result
