"""Belady's MIN: the most hits that any cache of so many experts can have, with the future known.

A miss may be passed by (bypass), or must be admitted (forced). What lies between the two is what admission can gain.
All experts of an event are needed at once. They count as hits as the event finds them; what is kept is chosen after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .events import Event
from .policies.oracle import next_uses
from .shape import Routing
from .trace import FloatArray, Phase


def most_hits(
    routing: Routing, events: Sequence[Event], capacity: int, *, bypass: bool, phase: Phase | None = None
) -> int:
    """The hits of MIN over events, from an empty cache.

    It keeps, of what is there and what was just used, the `capacity` whose next use is nearest; forced, all that was
    just used comes before everything else.

    Args:
        routing: The model's.
        events: In order.
        capacity: Experts of all layers together.
        bypass: Whether what was just used may be left out.
        phase: Only hits of this phase count, and are aimed at; None for all. What other events use can be kept all the
            same.
    """
    held = np.zeros((routing.layers, routing.experts), np.bool_)
    coming = np.full((routing.layers, routing.experts), np.inf)
    count = hits = 0
    for event, after in zip(events, next_uses(routing, events, phase=phase), strict=True):
        row = held[event.layer]
        found = int(np.count_nonzero(row[event.experts]))
        if phase is None or event.phase == phase:
            hits += found
        coming[event.layer, event.experts] = after
        row[event.experts] = True
        count += len(event.experts) - found
        if count > capacity:
            _shrink(held, coming, event, capacity, bypass=bypass)
            count = capacity
    return hits


def _shrink(held: npt.NDArray[np.bool_], coming: FloatArray, event: Event, capacity: int, *, bypass: bool) -> None:
    """Leave what is needed soonest."""
    flat = held.ravel()
    places = np.flatnonzero(flat)
    uses = coming.ravel()[places]
    if not bypass:
        # What was just used is no victim while there is another one; numbers of events are 0 or more.
        first = event.layer * held.shape[1]
        uses = np.where(np.isin(places, first + event.experts), -1 / (1 + uses), uses)
    farthest = np.argsort(-uses, kind="stable")[: len(places) - capacity]
    flat[places[farthest]] = False
