"""What is trained beside frozen weights that stream: adapters. They are plain tensors in memory, and in no block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from .devices.base import Device
from .layout import Changing

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Beside:
    """How a model gets them, and what they take."""

    put: Callable[[nn.Module], nn.Module]
    """Puts them into a model whose own parameters are there, and leaves these frozen, the same objects. Gives what is
    to be run: the model may have been wrapped."""
    changing: Callable[[Sequence[nn.Parameter], Device], Changing]
    """What it takes to train these, their weights included."""


def trained_in(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that want a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def renamed(values: Mapping[str, T], before: Mapping[str, nn.Parameter], after: nn.Module) -> dict[str, T]:
    """What is known by the names of parameters, by the names that they have now.

    Args:
        values: By name, as it was.
        before: The parameters as they were named.
        after: The model that they are in now.
    """
    names = {id(parameter): name for name, parameter in after.named_parameters()}
    return {names[id(before[name])]: value for name, value in values.items()}
