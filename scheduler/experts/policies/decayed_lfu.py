"""Decayed LFU: keep what was used most often lately."""

from __future__ import annotations

from typing import ClassVar, Final

from ..events import Event
from ..shape import Routing
from ..trace import FloatArray
from .decaying import DecayingCounts

HALF_LIFE: Final = 32.0
"""Tokens."""


class DecayedLfu:
    """Values are counts of tokens that lose half their weight every `half_life` tokens of their layer.

    Counting tokens rather than steps lets a prompt weigh as much as the same tokens one by one, so that it warms up
    what decoding begins with, and of a long one only the end counts.
    """

    name: ClassVar[str] = "decayed-lfu"
    summary: ClassVar[str] = "what was used most often lately"

    def __init__(self, routing: Routing, *, half_life: float = HALF_LIFE) -> None:
        self._counts = DecayingCounts(routing, half_life)

    @property
    def values(self) -> FloatArray:
        """See `Policy`."""
        return self._counts.values

    @property
    def earlier(self) -> FloatArray:
        """See `Policy`."""
        return self._counts.earlier

    def seen(self, event: Event) -> None:
        """See `Policy`."""
        self._counts.add(event)
