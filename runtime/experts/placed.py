"""Experts in a layout: their blocks, and how many slots they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from ...memory.image import device_image
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
    """By part: what a slot of the tier that computes has to hold."""
    host_slot_nbytes: tuple[int, ...] = ()
    """By part, beside a device apart: what a slot in host memory has to hold."""
    read_nbytes: int
    """Of one expert from disk, rounding included; the largest."""
    capacity: int = 0
    """Experts that are kept at a time."""
    passing: int = 0
    """Experts that can be on their way through at a time, besides."""
    host_capacity: int = 0
    """Experts that host memory keeps above the disk, beside a device apart."""
    host_has_all: bool = False
    """Whether host memory keeps all of them, beside a device apart: as blocks that stay there."""

    @property
    def apart(self) -> bool:
        """Whether the tier that computes is a device's."""
        return bool(self.host_slot_nbytes)

    @property
    def first(self) -> int:
        """Their first block: from here on all are experts'."""
        return int(self.blocks[0][0, 0])

    @property
    def each_nbytes(self) -> int:
        """Memory of one expert in the tier that computes."""
        return sum(self.slot_nbytes)

    @property
    def nbytes(self) -> int:
        """Memory of all slots there."""
        return (self.capacity + self.passing) * self.each_nbytes

    @property
    def host_nbytes(self) -> int:
        """Memory of all slots of the host's, beside a device apart; none where all experts are blocks that stay."""
        return 0 if self.host_has_all else self.host_capacity * sum(self.host_slot_nbytes)

    @property
    def missed(self) -> float:
        """Part of the uses whose expert is not in the tier that computes, if all experts were used alike; less, where
        some are preferred."""
        return 1 - min(self.capacity / self.routing.total, 1.0)

    @property
    def read(self) -> float:
        """Part of the uses that is read from disk, likewise. The host has what the device has, and more."""
        return 1 - min(max(self.capacity, self.host_capacity) / self.routing.total, 1.0) if self.apart else self.missed

    @property
    def read_per_token(self) -> float:
        """Bytes read from disk for a token that is computed by itself, if all experts were used alike."""
        return self.routing.layers * self.routing.top_k * self.read_nbytes * self.read

    @property
    def read_for_all(self) -> float:
        """The same for a sweep that uses all experts."""
        return self.routing.total * self.read_nbytes * self.read

    def uses_of(self, block: int) -> float | None:
        """How often a block is brought to where it is computed per token, likewise; None for one that is no
        expert's."""
        if block < self.first:
            return None
        return self.routing.top_k / self.routing.experts * self.missed

    def reads_of(self, block: int) -> float | None:
        """How often it is read from disk."""
        if block < self.first:
            return None
        return self.routing.top_k / self.routing.experts * self.read

    def choices(self, room: int, depth: int) -> tuple[int, ...]:
        """Numbers of experts that may be on their way through, the best first.

        Args:
            room: Bytes of memory for everything.
            depth: Bytes that keep a drive busy.
        """
        wanted = max(FEW[0], min(self.routing.top_k, 1 + depth // self.each_nbytes))
        return (wanted, *FEW) if wanted * self.each_nbytes <= room // SHARE else FEW

    def given(self, *, room: int, passing: int, host_room: int = 0) -> PlacedExperts:
        """The same with as many slots as there is room for, `passing` of them for what is not kept.

        Args:
            room: Bytes of the tier that computes.
            passing: Experts on their way through it.
            host_room: Bytes of host memory, beside a device apart.
        """
        total = self.routing.total
        kept = max(0, min(room // self.each_nbytes - passing, total))
        on_host = min(host_room // sum(self.host_slot_nbytes), total) if self.apart else 0
        return replace(self, passing=passing, capacity=kept, host_capacity=on_host)


class ExpertCutter:
    """Cuts expert layers into blocks, once, whatever the rest is cut into.

    Args:
        found: The layers.
        backing: Has the bytes.
        separate: Whether a device apart computes.
        keep_skew: As for `device_image`.
    """

    def __init__(self, found: ExpertLayers, backing: Backing, *, separate: bool, keep_skew: bool) -> None:
        self._found = found
        self._backing = backing
        self._separate = separate
        self._keep_skew = keep_skew
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
            slot_nbytes=tuple(max(draft.front_nbytes for draft in half) for half in halves),
            host_slot_nbytes=tuple(max(d.image.nbytes for d in half) for half in halves) if self._separate else (),
            read_nbytes=sum(max(draft.image.read_nbytes for draft in half) for half in halves),
        )

    def _drafts(self, part: int) -> Sequence[Draft]:
        from ..layout import Draft

        found = []
        for layer in self._found.layers:
            name = layer.parts[part]
            for expert in range(self._found.routing.experts):
                portion = Portion(name=name, rows=(expert, expert + 1))
                image = self._backing.image([portion], move=not self._separate)
                there = device_image(image, keep_skew=self._keep_skew) if self._separate else None
                draft = Draft(id=-1, name=f"{name}[{expert}]", portions=(portion,), image=image, device_image=there)
                found.append(draft)
        return found
