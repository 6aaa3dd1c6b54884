"""Weights that are behind the steps of a training: parts of them that nobody has used since."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from ..memory.arena import Slot


class Arrears(Protocol):
    """What knows of them."""

    def behind(self, parameter: nn.Parameter) -> bool:
        """Whether parts of a parameter are: who uses it otherwise than by expert has to be caught."""

    def settle(self, block: int, slot: Slot) -> None:
        """Have all steps made for a block that is leased there."""
