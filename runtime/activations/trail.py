"""The order in which one forward left its storages, which backward goes back along."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from .hold import Hold, Where

if TYPE_CHECKING:
    from .store import ActivationStore


class Trail:
    """One forward.

    Units are what backward uses at about the same time: what a layer saved, or one storage outside of any. When the
    first storage of a unit is used, those before it are asked for, until as many bytes are on their way as the largest
    unit has: while one layer computes, the one before it comes back.

    Args:
        store: That brings them back.
    """

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self._units: list[list[weakref.ref[Hold]]] = []
        self._ends: list[int] = []
        """Bytes of all units up to each one."""
        self._largest = 0
        self._asked: list[bool] = []
        """Whether a unit was asked for, or is still being made."""
        self._last_of: dict[int, int] = {}
        """The last unit that saved a storage again."""
        self._known: dict[tuple[int, int], tuple[weakref.ref[torch.UntypedStorage], weakref.ref[Hold]]] = {}
        """Holds, by address and version of a storage that may have gone since."""

    def begin_unit(self) -> int:
        """The number of a new one."""
        self._units.append([])
        self._asked.append(False)
        self._ends.append(self._ends[-1] if self._ends else 0)
        return len(self._units) - 1

    def add(self, hold: Hold, storage: torch.UntypedStorage, version: int, unit: int) -> None:
        """Note a storage that was taken."""
        hold.trail = self
        self._units[unit].append(weakref.ref(hold))
        for later in range(unit, len(self._ends)):
            self._ends[later] += hold.nbytes
        self._largest = max(self._largest, self._nbytes(unit, unit))
        self._known[storage._cdata, version] = weakref.ref(storage), weakref.ref(hold)

    def use(self, hold: Hold, unit: int) -> None:
        """Note that another unit saved it, too: backward comes there first."""
        if unit != self._last_of.get(hold.number):
            self._last_of[hold.number] = unit
            self._units[unit].append(weakref.ref(hold))

    def find(self, storage: torch.UntypedStorage, version: int) -> Hold | None:
        """What has been taken of this storage, as it is now."""
        found = self._known.get((storage._cdata, version))
        return found[1]() if found is not None and found[0]() is storage else None

    def end(self) -> None:
        """Forward is over: what backward begins with stays, or is asked for."""
        self._known.clear()
        self._last_of.clear()
        self.arrive(len(self._units))

    def arrive(self, unit: int) -> None:
        """Backward is at a unit: have it, and what comes next."""
        low = unit
        while low > 0 and (low == unit or self._nbytes(low, unit - 1) < self._largest):
            low -= 1
        for number in range(min(unit, len(self._units) - 1), low - 1, -1):
            if self._asked[number]:
                continue
            self._asked[number] = True
            for reference in self._units[number]:
                hold = reference()
                if hold is not None and hold.where is not Where.HERE:
                    self._store.bring(hold, ahead=True)

    def _nbytes(self, first: int, last: int) -> int:
        """Bytes of the units from one to another."""
        return self._ends[last] - (self._ends[first - 1] if first else 0)
