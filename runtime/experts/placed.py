"""Experts in a layout: their blocks, and how many slots they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from ...scheduler.experts.shape import Routing
from ...scheduler.experts.trace import IntArray
from ..backing import Backing, Portion
from .layers import ExpertLayer, ExpertLayers

if TYPE_CHECKING:
    from ..layout import Draft

FEW: Final = (2, 1)
"""Experts on their way through, where memory is short: one that is computed, and one that is read meanwhile."""
SHARE: Final = 8
"""What is only on its way through takes up to this part of the room, where it takes more than that of few."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedExperts:
    """All experts of a model."""

    layers: tuple[ExpertLayer, ...]
    routing: Routing
    blocks: tuple[IntArray, ...]
    """By part, [layers, experts]: the block."""
    slot_nbytes: tuple[int, ...]
    """By part: what a slot has to hold."""
    read_nbytes: int
    """Of one expert from disk, rounding included; the largest."""
    capacity: int = 0
    """Experts that are kept at a time."""
    passing: int = 0
    """Experts that can be on their way through at a time, besides."""

    @property
    def first(self) -> int:
        """Their first block: from here on all are experts'."""
        return int(self.blocks[0][0, 0])

    @property
    def each_nbytes(self) -> int:
        """Memory of one expert."""
        return sum(self.slot_nbytes)

    @property
    def nbytes(self) -> int:
        """Memory of all slots."""
        return (self.capacity + self.passing) * self.each_nbytes

    @property
    def missed(self) -> float:
        """Part of the uses that is read from disk, if all experts were used alike; less, where some are preferred."""
        return 1 - min(self.capacity / self.routing.total, 1.0)

    @property
    def read_per_token(self) -> float:
        """Bytes read from disk for a token that is computed by itself, if all experts were used alike."""
        return self.routing.layers * self.routing.top_k * self.read_nbytes * self.missed

    def uses_of(self, block: int) -> float | None:
        """How often a block is read per token, likewise; None for one that is no expert's."""
        if block < self.first:
            return None
        return self.routing.top_k / self.routing.experts * self.missed

    def choices(self, room: int, depth: int) -> tuple[int, ...]:
        """Numbers of experts that may be on their way through, the best first.

        Args:
            room: Bytes of memory for everything.
            depth: Bytes that keep a drive busy.
        """
        wanted = max(FEW[0], min(self.routing.top_k, 1 + depth // self.each_nbytes))
        return (wanted, *FEW) if wanted * self.each_nbytes <= room // SHARE else FEW

    def given(self, *, room: int, passing: int) -> PlacedExperts:
        """The same with as many slots as there is room for, `passing` of them for what is not kept."""
        kept = room // self.each_nbytes - passing
        return replace(self, passing=passing, capacity=max(0, min(kept, self.routing.total)))


class ExpertCutter:
    """Cuts expert layers into blocks, once, whatever the rest is cut into."""

    def __init__(self, found: ExpertLayers, backing: Backing) -> None:
        self._found = found
        self._backing = backing
        self._made: list[Draft] | None = None

    @property
    def names(self) -> frozenset[str]:
        """The parameters that are cut."""
        return self._found.names

    def blocks(self, first: int) -> tuple[list[Draft], PlacedExperts]:
        """The blocks, numbered from `first`: those of the first parts of all layers, then those of the second."""
        routing = self._found.routing
        if self._made is None:
            self._made = [draft for part in (0, 1) for draft in self._drafts(part)]
        drafts = [replace(draft, id=first + number) for number, draft in enumerate(self._made)]
        numbers = first + np.arange(2 * routing.total, dtype=np.int64).reshape(2, routing.layers, routing.experts)
        halves = (drafts[: routing.total], drafts[routing.total :])
        return drafts, PlacedExperts(
            layers=self._found.layers,
            routing=routing,
            blocks=tuple(numbers),
            slot_nbytes=tuple(max(draft.image.nbytes for draft in half) for half in halves),
            read_nbytes=sum(max(draft.image.read_nbytes for draft in half) for half in halves),
        )

    def _drafts(self, part: int) -> Sequence[Draft]:
        from ..layout import Draft

        found = []
        for layer in self._found.layers:
            name = layer.parts[part]
            for expert in range(self._found.routing.experts):
                portion = Portion(name=name, rows=(expert, expert + 1))
                image = self._backing.image([portion], move=True)
                draft = Draft(id=-1, name=f"{name}[{expert}]", portions=(portion,), image=image, device_image=None)
                found.append(draft)
        return found
