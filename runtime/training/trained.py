"""What is trained: parameters, by their numbers in the order of `parameters()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    experts: int = 0
    """How many experts of a layer it holds, which lie one after the other; 0 where it is no such parameter."""

    @property
    def elements(self) -> int:
        """How many."""
        return self.parameter.numel()


def trained_as(name: str, parameter: nn.Parameter, stride: Sequence[int], experts: Mapping[str, int]) -> Trained:
    """A parameter that is trained.

    Args:
        name: Its own.
        parameter: It.
        stride: Of its elements in memory; none where nothing looks at it.
        experts: How many experts lie in each parameter that holds some, by name.
    """
    between = bool(stride) and stride[0] != parameter.numel() // len(parameter)  # they lie between each other
    count = 0 if between else experts.get(name, 0)
    return Trained(name=name, parameter=parameter, stride=tuple(stride), experts=count)


def gradient_dtype(each: Trained, *, wide: bool) -> torch.dtype:
    """What the gradient of a parameter is kept in."""
    return torch.float32 if wide else each.parameter.dtype
