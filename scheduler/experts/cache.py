"""Which experts a tier holds: slots for all layers together, a minimum for each, and a policy that ranks what is
there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from ...memory.errors import UsageError
from .events import Event
from .policies.policy import Policy
from .shape import Routing
from .trace import IntArray

MINIMUM: Final = 1.0
"""Of an equal share of the slots, what each layer keeps for itself. From the sweep of docs/moe.md."""


Admission = Literal["always", "better", "proven", "adaptive"]
"""When a miss comes in.

always: whatever it replaces. better: if it is worth more than that. proven: if it was worth more even before the use at
hand, so that what is used for the first time in long passes by. adaptive: always; but a layer that has hit nothing for
some time changes to proven, and back if that hits nothing either. Experts that take turns, more of them than there are
slots, defeat every rule that always admits; those that are kept then are hit once a turn.
"""
ADMISSIONS: Final[tuple[Admission, ...]] = ("always", "better", "proven", "adaptive")
ADMISSION: Final[Admission] = "adaptive"
"""From the sweep of docs/moe.md."""
PATIENCE: Final = 8
"""Events of a layer without a hit after which `adaptive` changes; doubles each time, as turns may be long."""


class Origin(IntEnum):
    """Why an expert was brought into a cache."""

    MISSED = 1
    """A layer needed it, and it was brought for that."""
    FILLED = 2
    """A layer needed it and another processor computed it; it was brought after that, over a link that was idle."""
    WARMED = 3
    """A prompt used it most, and there was room."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSetting:
    """How a cache is run.

    Args:
        capacity: Experts that it holds, of all layers together.
        minimum: Share of an equal part of the capacity (capacity / layers) that no other layer can take from one. At 1
            each layer has its own part; at 0 all share one pool. As long as there are slots, it is an expert at least.
        admission: When a miss comes in.
    """

    capacity: int
    minimum: float = MINIMUM
    admission: Admission = ADMISSION

    def __post_init__(self) -> None:
        if self.capacity < 0:
            raise UsageError(f"a cache of {self.capacity} experts: it holds 0 or more")
        if not 0 <= self.minimum <= 1:
            raise UsageError(f"a minimum of {self.minimum} of a layer's part: it is between 0 (one pool) and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheStatistics:
    """What a cache did so far."""

    held: int
    admitted: int
    evicted: int
    bypassed: int
    """Experts that were there for the taking and were not worth a slot."""


class ExpertCache:
    """The experts that one tier holds. Knows numbers only: what is admitted has been brought, or will be.

    Args:
        routing: The model's.
        setting: How it is run.
        policy: Ranks experts. May be shared with the caches of other tiers; whoever runs layers calls its `seen`.
    """

    def __init__(self, routing: Routing, setting: CacheSetting, policy: Policy) -> None:
        self._routing = routing
        self._setting = setting
        self._policy = policy
        self._capacity = self._free = min(setting.capacity, routing.total)
        self.minimums: IntArray = minimums(routing.layers, self._free, setting.minimum)
        self._counts: IntArray = np.zeros(routing.layers, np.int64)
        self.held: npt.NDArray[np.bool_] = np.zeros((routing.layers, routing.experts), np.bool_)
        """[layers, experts] What is there. Not to be changed by whoever reads it."""
        self.origins: npt.NDArray[np.uint8] = np.zeros((routing.layers, routing.experts), np.uint8)
        """[layers, experts] Why what is there was brought; 0 for what is not."""
        self._barren: IntArray = np.zeros(routing.layers, np.int64)
        """Events without a hit, by layer, since the last hit or change."""
        self._patience: IntArray = np.full(routing.layers, PATIENCE, np.int64)
        self._proven: npt.NDArray[np.bool_] = np.full(routing.layers, setting.admission == "proven")
        self._admitted = self._evicted = self._bypassed = 0

    def statistics(self) -> CacheStatistics:
        """What it did so far."""
        return CacheStatistics(
            held=int(self._counts.sum()), admitted=self._admitted, evicted=self._evicted, bypassed=self._bypassed
        )

    def seen(self, event: Event) -> None:
        """A layer is about to run: called once per event, before anything is admitted for it."""
        layer = event.layer
        if self._setting.admission != "adaptive" or event.phase == "prefill" or self._counts[layer] == 0:
            return
        if self.held[layer, event.experts].any():
            self._barren[layer] = 0
            return
        self._barren[layer] += 1
        if self._barren[layer] >= self._patience[layer]:
            self._proven[layer] = not self._proven[layer]
            self._barren[layer] = 0
            self._patience[layer] *= 2

    def admit(
        self, layer: int, wanted: Iterable[int], *, needed: IntArray, origin: Origin = Origin.MISSED
    ) -> list[tuple[int, tuple[int, int] | None]]:
        """Take in experts of a layer, as far as they are worth it.

        Args:
            layer: The layer; of the last event that the policy has seen.
            wanted: Experts of it that are not there.
            needed: Experts of the layer that runs, which it still needs: none of them is evicted.
            origin: Why they are brought.

        Returns:
            Those that got a slot, each with the (layer, expert) that it replaces, or None where a slot was free.
        """
        values = self._policy.values
        worth = self._policy.earlier if self._proven[layer] else values[layer]
        always = self._setting.admission != "better" and not self._proven[layer]
        ranked = sorted(wanted, key=lambda expert: -worth[expert])
        taken: list[tuple[int, tuple[int, int] | None]] = []
        victims: list[int] | None = None
        for expert in ranked:
            assert not self.held[layer, expert], "what is there is not admitted again"
            if self._free_for(layer):
                self._free -= 1
                self._put(layer, expert, origin)
                taken.append((expert, None))
                continue
            if victims is None:
                victims = self._victims(layer, needed, values)
            found = self._next_victim(layer, victims)
            if found is None or not (always or worth[expert] > values[found]):
                self._bypassed += 1
                continue
            self._remove(found)
            self._put(layer, expert, origin)
            taken.append((expert, found))
        return taken

    def fill_free(self, layer: int, wanted: Iterable[int], *, origin: Origin = Origin.WARMED) -> list[int]:
        """Take experts of a layer into slots that are free, those worth most first; nothing is evicted.

        For prompts: they use nearly all experts, and would flush what decoding has built up.
        """
        values = self._policy.values
        taken = []
        for expert in sorted(wanted, key=lambda expert: -values[layer, expert]):
            if not self._free_for(layer):
                self._bypassed += 1
                continue
            self._free -= 1
            self._put(layer, expert, origin)
            taken.append(expert)
        return taken

    def drop(self, layer: int, expert: int) -> None:
        """Give up a slot: what was to be in it did not come."""
        self._remove((layer, expert))
        self._free += 1

    def recount(self) -> None:
        """Count anew what is held: whoever was interrupted in between may have left sums behind."""
        self.origins[~self.held] = 0
        self._counts[:] = self.held.sum(axis=1)
        self._free = self._capacity - int(self._counts.sum())

    def _free_for(self, layer: int) -> bool:
        """Whether a slot is free that no other layer's minimum is waiting for."""
        if self._free == 0:
            return False
        if self._counts[layer] < self.minimums[layer]:
            return True
        return self._free > int(np.maximum(self.minimums - self._counts, 0).sum())

    def _victims(self, layer: int, needed: IntArray, values: npt.NDArray[np.float64]) -> list[int]:
        """What may be evicted for a layer, the least valuable last, as positions in the flattened arrays.

        Of what is worth the same, the layer whose turn comes latest gives first: its expert is idle for longest.
        """
        possible = self.held & (self._counts > self.minimums)[:, None]
        possible[layer] = self.held[layer]
        possible[layer, needed] = False
        places = np.flatnonzero(possible)
        distances = (places // self._routing.experts - layer - 1) % self._routing.layers
        order = np.lexsort((-distances, values.ravel()[places]))
        found: list[int] = places[order[::-1]].tolist()
        return found

    def _next_victim(self, layer: int, victims: list[int]) -> tuple[int, int] | None:
        while victims:
            row, expert = divmod(victims.pop(), self._routing.experts)
            # Another layer may have come down to its minimum since the list was made.
            if row == layer or self._counts[row] > self.minimums[row]:
                return row, expert
        return None

    def _put(self, layer: int, expert: int, origin: Origin) -> None:
        self.held[layer, expert] = True
        self.origins[layer, expert] = origin
        self._counts[layer] += 1
        self._admitted += 1

    def _remove(self, place: tuple[int, int]) -> None:
        self.held[place] = False
        self.origins[place] = 0
        self._counts[place[0]] -= 1
        self._evicted += 1


def minimums(layers: int, slots: int, share: float) -> IntArray:
    """Slots that each layer keeps: `share` of an equal part, and while there are slots one; spread evenly."""
    if share == 0:
        return np.zeros(layers, np.int64)
    total = min(max(int(share * slots), min(slots, layers)), slots)
    # Layer i gets what the line total · i / layers gains between i and i + 1: parts that differ by 1, spread evenly.
    edges = (np.arange(layers + 1) * total) // layers
    return np.diff(edges).astype(np.int64)
