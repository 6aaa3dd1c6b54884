"""Tensors in flight: those that nothing keeps for long, each counted from when it is seen until its memory is gone.

Results of modules, gradients between two nodes of a backward pass, what an optimizer computes with. They are looked for
in some steps only: in those that are looked at whole (`StepTurns`), as often as it takes little of the time. A step is
like the others, and peaks are where most is known of them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch

from .guard import harmless
from .recorder import Recorder
from .schema import Category, Tier
from .storages import storage_key, tensors_in, tier_of
from .turns import FIRST_STEPS, StepTurns

LEAST_NBYTES: Final = 1 << 16
"""Smaller tensors weigh nothing where a peak is, and there are many of them."""
SHARE: Final = 100
"""After the first steps, looking may take one part in so many of the time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Flight:
    """A storage that has no other row."""

    storage: weakref.ref[Any]
    nbytes: int
    tier: Tier
    category: Category
    module: int


class Flights:
    """The storages in flight. From any thread.

    Args:
        counted: Whether the storage at this address has a row of another kind.
        turns: Whether the step under way is looked at whole: the others are not looked at here either.
    """

    def __init__(self, recorder: Recorder, counted: Callable[[int], bool], turns: StepTurns) -> None:
        self._recorder = recorder
        self._counted = counted
        self._turns = turns
        self._live: dict[int, _Flight] = {}
        """By address of the storage."""
        self._began = recorder.clock()
        self._steps = 0
        self.looking = True
        """Whether this step is one that is looked at."""
        self.spent_ns = 0
        """What looking has taken."""

    def __enter__(self) -> Flights:
        self._recorder.on_step.append(self.step_begins)
        self._recorder.taken = self.taken
        return self

    def __exit__(self, *failure: object) -> None:
        self.looking = False
        self._recorder.on_step.remove(self.step_begins)

    def step_begins(self) -> bool:
        """Decide whether the step is looked at. That takes no time."""
        self._steps += 1
        elapsed = self._recorder.clock() - self._began
        cheap = self._steps <= FIRST_STEPS or self.spent_ns * SHARE <= elapsed
        self.looking = cheap and self._turns.looking
        return False

    def module_returned(self, row: int, depth: int, inputs: Any, result: Any) -> None:
        """What a module returns need not be saved by anybody, and is there all the same."""
        if self.looking:
            self.see(tensors_in(result), Category.ACTIVATION, row, self._recorder.clock())

    @harmless
    def see(self, tensors: Iterable[torch.Tensor | None], category: Category, row: int, since: int) -> None:
        """Count these from `since` on, if they are not counted yet: they were made between then and now."""
        start = self._recorder.clock()
        for tensor in tensors:
            key = 0 if tensor is None else storage_key(tensor)
            if not key or tensor is None:
                continue
            storage = tensor.untyped_storage()
            nbytes = storage.nbytes()
            if nbytes < LEAST_NBYTES:
                continue
            known = self._live.get(key)
            if (known is not None and known.storage() is storage) or self._counted(key):
                continue
            self._drop(key, known)
            flight = _Flight(
                storage=weakref.ref(storage, functools.partial(self._gone, key)),
                nbytes=nbytes,
                tier=tier_of(tensor),
                category=category,
                module=row,
            )
            self._live[key] = flight
            self._recorder.memory(nbytes, flight.tier, category, module=row, at=since)
        self.spent_ns += self._recorder.clock() - start

    def taken(self, key: int) -> None:
        """The storage at this address has got a row of another kind."""
        flight = self._live.get(key)
        if flight is not None:
            self._drop(key, flight)

    def _gone(self, key: int, storage: weakref.ref[Any]) -> None:
        flight = self._live.get(key)
        if flight is not None and flight.storage is storage:
            self._drop(key, flight)

    def _drop(self, key: int, flight: _Flight | None) -> None:
        if flight is not None and self._live.pop(key, None) is flight:
            self._recorder.memory(-flight.nbytes, flight.tier, flight.category, module=flight.module)
