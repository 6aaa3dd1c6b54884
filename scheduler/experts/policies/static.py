"""Static: learn which experts of each layer are used most, and then keep those for good."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from ..events import Event
from ..shape import Routing
from ..trace import FloatArray, IntArray

LEARNING: Final = 256
"""Tokens."""


class Static:
    """Values are counts of the first `learning` tokens of each layer, and stay as they are from then on.

    With a cache that admits only what is worth more than its victim, nothing changes any more after that: what
    KTransformers and Fiddler do with counts from a recording.

    Args:
        routing: The model's.
        learning: Tokens per layer that are counted.
        counts: [layers, experts] counts from elsewhere, in the place of learning.
    """

    name: ClassVar[str] = "static"
    summary: ClassVar[str] = f"what the first {LEARNING} tokens used most, for good"

    def __init__(self, routing: Routing, *, learning: int = LEARNING, counts: FloatArray | None = None) -> None:
        self.values: FloatArray = np.zeros((routing.layers, routing.experts)) if counts is None else counts
        self.earlier: FloatArray = np.zeros(routing.experts)
        self._left: IntArray = np.full(routing.layers, learning if counts is None else 0, np.int64)

    def seen(self, event: Event) -> None:
        """See `Policy`."""
        self.earlier = self.values[event.layer].copy()
        if self._left[event.layer] > 0:
            self._left[event.layer] -= event.tokens
            self.values[event.layer, event.experts] += event.rows
