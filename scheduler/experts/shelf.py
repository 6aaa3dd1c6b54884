"""Experts that host memory keeps for a device apart, above the disk: slots of their own, and a cache.

What a layer needs and the shelf has is copied from there, or computed by the CPU where it lies. What it has not is
read: into a slot of the shelf where the cache takes it in, else through the host's ring, like all else that passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ...memory.arena import Slot
from .cache import CacheSetting, ExpertCache, Origin
from .events import Event
from .policies.policy import Policy
from .shape import Routing
from .trace import IntArray


class HostShelf:
    """What host memory keeps.

    Args:
        routing: The model's.
        setting: How the cache is run.
        policy: Ranks experts; shared with the device's cache, whose owner calls its `seen`.
        blocks: By part, [layers, experts]: its block.
        slots: By part, its slots: as many as the cache has.
        let_go: Has host copies forgotten; gives those that are. See `Core.let_go`.
    """

    def __init__(
        self,
        *,
        routing: Routing,
        setting: CacheSetting,
        policy: Policy,
        blocks: Sequence[IntArray],
        slots: Sequence[Sequence[Slot]],
        let_go: Callable[[Sequence[int]], list[int]],
    ) -> None:
        assert all(len(each) == setting.capacity for each in slots), "every expert of the cache has a slot"
        self.cache = ExpertCache(routing, setting, policy)
        self._blocks = blocks
        self._slots = [tuple(reversed(each)) for each in slots]
        self._free = [list(each) for each in self._slots]
        self._lying: dict[int, tuple[int, Slot]] = {}
        """By block of what is kept: its part, and its slot."""
        self._leaving: dict[int, tuple[int, Slot]] = {}
        """The same of what is to go, and may still be in use."""
        self._let_go = let_go

    @property
    def held(self) -> npt.NDArray[np.bool_]:
        """[layers, experts] What is kept, or on its way here."""
        return self.cache.held

    def take(self, event: Event, wanted: Sequence[int]) -> list[tuple[int, Slot]]:
        """Blocks of a layer that are to be kept, each with its slot: of `wanted`, which are about to be read."""
        if event.phase == "prefill":
            taken = self.cache.fill_free(event.layer, wanted, origin=Origin.WARMED)
        else:
            taken = []
            for expert, victim in self.cache.admit(event.layer, wanted, needed=event.experts):
                taken.append(expert)
                if victim is not None:
                    self._leave(*victim)
        self._reap()
        places: list[tuple[int, Slot]] = []
        for expert in taken:
            blocks = [int(numbers[event.layer, expert]) for numbers in self._blocks]
            if not all(self._free) or any(block in self._leaving for block in blocks):
                self.cache.drop(event.layer, expert)  # a copy of what leaves is still under way: this one passes
                continue
            for part, block in enumerate(blocks):
                slot = self._free[part].pop()
                self._lying[block] = part, slot
                places.append((block, slot))
        return places

    def refused(self, layer: int, experts: Iterable[int]) -> None:
        """Experts that were to be kept are not, or what was read for them may not be there."""
        for expert in experts:
            if self.cache.held[layer, expert]:
                self.cache.drop(layer, expert)
            self._leave(layer, expert)

    def recover(self) -> None:
        """Make slots and the cache agree where a layer did not come to its end, wherever it was left. What such a layer
        was to have kept has been `refused`."""
        for block in self._leaving:
            self._lying.pop(block, None)
        for layer, expert in np.argwhere(self.held).tolist():
            if not all(int(numbers[layer, expert]) in self._lying for numbers in self._blocks):
                self.cache.drop(layer, expert)
        self.cache.recount()
        for layer, expert in np.argwhere(~self.held).tolist():
            self._leave(layer, expert)
        for part, slots in enumerate(self._slots):
            taken = {slot.offset for _, slot in (*self._lying.values(), *self._leaving.values())}
            self._free[part] = [slot for slot in slots if slot.offset not in taken]

    def _leave(self, layer: int, expert: int) -> None:
        for numbers in self._blocks:
            block = int(numbers[layer, expert])
            if block in self._lying:
                self._leaving[block] = self._lying[block]  # first: who is interrupted behind it still knows the slot
                del self._lying[block]

    def _reap(self) -> None:
        """Free the slots of what has left."""
        for block in self._let_go(tuple(self._leaving)) if self._leaving else ():
            part, slot = self._leaving.pop(block)
            self._free[part].append(slot)
