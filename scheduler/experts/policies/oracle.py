"""The oracle: keep what will be used next. Needs the future, so it shows what a policy could reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from ..events import Event
from ..shape import Routing
from ..trace import FloatArray, Phase


class Oracle:
    """Values are −(the number of the event that uses an expert next), −∞ where none does.

    In a cache of one pool that admits what is `better` it decides as Belady's MIN does, but for experts that the
    running layer needs: MIN may give those up at once.

    Args:
        routing: The model's.
        events: All that will be seen, in order.
    """

    name: ClassVar[str] = "oracle"
    summary: ClassVar[str] = "what will be used next; needs the future"

    def __init__(self, routing: Routing, events: Sequence[Event]) -> None:
        self.values: FloatArray = np.full((routing.layers, routing.experts), -np.inf)
        self.earlier: FloatArray = self.values[0]
        self._next: Iterator[FloatArray] = iter(next_uses(routing, events))

    def seen(self, event: Event) -> None:
        """See `Policy`. Events must be those that it was made with."""
        self.values[event.layer, event.experts] = -next(self._next)
        self.earlier = self.values[event.layer]  # the past adds nothing to what is known


def next_uses(routing: Routing, events: Sequence[Event], *, phase: Phase | None = None) -> list[FloatArray]:
    """By event, and expert of it: the number of the next event that uses the expert, of a phase if one is given; ∞
    where there is none."""
    coming = np.full((routing.layers, routing.experts), np.inf)
    found: list[FloatArray] = []
    for number in range(len(events) - 1, -1, -1):
        event = events[number]
        found.append(coming[event.layer, event.experts].copy())
        if phase is None or event.phase == phase:
            coming[event.layer, event.experts] = number
    found.reverse()
    return found
