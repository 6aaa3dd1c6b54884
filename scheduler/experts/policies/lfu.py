"""LFU: keep what was used most often."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ..events import Event
from ..shape import Routing
from ..trace import FloatArray


class Lfu:
    """Values are the tokens that used an expert so far. They never age: MoE-Infinity's rule for victims."""

    name: ClassVar[str] = "lfu"
    summary: ClassVar[str] = "what was used most often"

    def __init__(self, routing: Routing) -> None:
        self.values: FloatArray = np.zeros((routing.layers, routing.experts))
        self.earlier: FloatArray = np.zeros(routing.experts)

    def seen(self, event: Event) -> None:
        """See `Policy`."""
        self.earlier = self.values[event.layer].copy()
        self.values[event.layer, event.experts] += event.rows
