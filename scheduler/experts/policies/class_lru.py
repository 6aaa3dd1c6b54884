"""ClassLRU-like: keep classes of use; within a class, what was used last."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from ..events import Event
from ..shape import Routing
from ..trace import FloatArray
from .decaying import DecayingCounts

HALF_LIFE: Final = 128.0
"""Tokens; what llama.cpp's cache is said to take."""


class ClassLru:
    """Values are a class, ⌊log2(1 + decayed uses)⌋, and within a class the time of last use.

    llama.cpp's expert cache has a rule of this kind, by classes of decayed use. Its exact classes were not to be had,
    so this is like it and not it.
    """

    name: ClassVar[str] = "class-lru"
    summary: ClassVar[str] = "classes of recent use; within a class, what was used last"

    def __init__(self, routing: Routing, *, half_life: float = HALF_LIFE) -> None:
        self._counts = DecayingCounts(routing, half_life)
        self._last: FloatArray = np.zeros((routing.layers, routing.experts))
        self._last_before: FloatArray = np.zeros(routing.experts)
        self._clock = 0.0

    @property
    def values(self) -> FloatArray:
        """See `Policy`."""
        return self._ranked(self._counts.values, self._last)

    @property
    def earlier(self) -> FloatArray:
        """See `Policy`."""
        return self._ranked(self._counts.earlier, self._last_before)

    def seen(self, event: Event) -> None:
        """See `Policy`."""
        self._clock += 1
        self._counts.add(event)
        self._last_before = self._last[event.layer].copy()
        self._last[event.layer, event.experts] = self._clock

    def _ranked(self, counts: FloatArray, last: FloatArray) -> FloatArray:
        found: FloatArray = np.floor(np.log2(1 + counts)) + last / (self._clock + 1)
        return found
