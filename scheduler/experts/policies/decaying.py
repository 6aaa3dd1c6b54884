"""Counts of tokens that lose half their weight every so many tokens."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from ..events import Event
from ..shape import Routing
from ..trace import FloatArray

_LARGEST: Final = 2.0**200
"""Weights grow instead of counts shrinking; before they overflow, all are divided by the same number."""


class DecayingCounts:
    """How often each expert was used, where a use counts less the more tokens have passed its layer since.

    Args:
        routing: The model's.
        half_life: Tokens after which a use counts half.
    """

    def __init__(self, routing: Routing, half_life: float) -> None:
        if half_life <= 0:
            raise ValueError(f"a half-life of {half_life} tokens: it must be above 0")
        self.scaled: FloatArray = np.zeros((routing.layers, routing.experts))
        """[layers, experts] Counts times `weights` of their layer."""
        self.weights: FloatArray = np.ones(routing.layers)
        """What a use counts now, by layer."""
        self.earlier: FloatArray = np.zeros(routing.experts)
        """[experts] Counts of the last event's layer, as they would be had it used none."""
        self._per_token = math.log(2) / half_life

    def add(self, event: Event) -> None:
        """Count an event. The tokens of one event come one after the other, and which of them used an expert is not
        known: each use counts their mean."""
        layer, passed = event.layer, event.tokens * self._per_token
        mean = -math.expm1(-passed) / passed
        self.weights[layer] *= math.exp(min(passed, 100.0))
        if self.weights[layer] > _LARGEST:
            self.scaled[layer] /= self.weights[layer]
            self.weights[layer] = 1.0
        self.earlier = self.scaled[layer] / self.weights[layer]
        self.scaled[layer, event.experts] += event.rows * mean * self.weights[layer]

    @property
    def values(self) -> FloatArray:
        """[layers, experts] The counts."""
        return self.scaled / self.weights[:, None]
