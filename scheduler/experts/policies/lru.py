"""LRU: keep what was used last."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ..events import Event
from ..shape import Routing
from ..trace import FloatArray


class Lru:
    """Values are times of last use; within an event, of the experts with more tokens.

    What was just used always has the highest value, so that `better` admits everything; `proven` admits what was used
    twice since its victim was used. Over all layers as one pool, a capacity below the experts of one token hits
    nothing, since what is used next is what was used longest ago; the cache's minimum per layer prevents that.
    """

    name: ClassVar[str] = "lru"
    summary: ClassVar[str] = "what was used last"

    def __init__(self, routing: Routing) -> None:
        self.values: FloatArray = np.zeros((routing.layers, routing.experts))
        self.earlier: FloatArray = np.zeros(routing.experts)
        self._clock = 0.0

    def seen(self, event: Event) -> None:
        """See `Policy`."""
        self._clock += 1
        self.earlier = self.values[event.layer].copy()
        self.values[event.layer, event.experts] = self._clock + event.rows / (event.tokens + 1)
