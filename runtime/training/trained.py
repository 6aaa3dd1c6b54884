"""What is trained: parameters, by their numbers in the order of `parameters()`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """One parameter that is trained."""

    name: str
    parameter: nn.Parameter
    stride: tuple[int, ...]
    """Of its elements in memory, when its weights are there."""

    @property
    def elements(self) -> int:
        """How many."""
        return self.parameter.numel()


def gradient_dtype(each: Trained, *, wide: bool) -> torch.dtype:
    """What the gradient of a parameter is kept in."""
    return torch.float32 if wide else each.parameter.dtype
