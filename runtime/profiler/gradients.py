"""Gradients that have their memory to themselves, as nearly all have: each storage is counted once."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .recorder import Recorder
from .schema import Category, Tier
from .storages import tier_of


class Owner(Protocol):
    """A parameter, for as long as it is watched."""

    row: int
    """Of the module that it is part of."""
    gradient: Whole | None
    """Its gradient, as it was when it was looked at last."""


@dataclass(kw_only=True, slots=True, eq=False)
class Whole:
    """A gradient that is a whole storage."""

    owner: Owner
    """The first of the parameters that have it: it is counted as that one's."""
    key: int
    nbytes: int
    tier: Tier
    storage: weakref.ref[Any]
    away: bool = False
    """Whether it was told to be gone when only that was looked at: whatever comes in its place will be as large."""


class WholeGradients:
    """Keeps their records, when it is told to look.

    Args:
        at_once: Whether a gradient is given back as soon as its memory is; else it is when its parameter is looked at.
    """

    def __init__(self, recorder: Recorder, *, at_once: bool) -> None:
        self._recorder = recorder
        self._at_once = at_once
        self._counted: dict[int, Whole] = {}
        """By address of the storage."""

    def holds(self, key: int) -> bool:
        """Whether the storage at this address is counted here."""
        return key in self._counted

    def hold(self, owner: Owner, gradient: torch.Tensor) -> bool:
        """Count a parameter's gradient, if it is such a one: whether it is."""
        if type(gradient) is not torch.Tensor or gradient.layout is not torch.strided:
            return False
        nbytes, storage = gradient.nbytes, gradient.untyped_storage()
        if not nbytes or gradient.device.type == "meta" or storage.nbytes() != nbytes:
            return False
        whole = owner.gradient
        if whole is not None and whole.away and self._counted.get(whole.key) is whole:
            self._come_back(whole)
        if whole is None or whole.storage() is not storage or self._counted.get(whole.key) is not whole:
            self._take(owner, storage, tier_of(gradient))
        return True

    def pass_by(self, owner: Owner, there: bool, changes: Counter[tuple[Tier, int]]) -> bool:
        """Look at nothing but whether a parameter has a gradient: a few operations, where `hold` is many.

        What comes and goes meanwhile counts as many bytes as were there when it was looked at, and `changes` is told of
        them, by tier and row. Returns False where there is one for the first time: it has to be looked at.
        """
        whole = owner.gradient
        if whole is None or self._counted.get(whole.key) is not whole:  # another one lies where it lay
            return not there
        if whole.away is there and whole.owner is owner:
            whole.away = not there
            changes[whole.tier, owner.row] += whole.nbytes if there else -whole.nbytes
        return True

    def drop(self, owner: Owner) -> None:
        """It has no such gradient any more. Another parameter that has it still will tell."""
        whole, owner.gradient = owner.gradient, None
        if whole is not None and whole.owner is owner:
            self._give_back(whole)

    def _take(self, owner: Owner, storage: torch.UntypedStorage, tier: Tier) -> None:
        key, nbytes = storage.data_ptr(), storage.nbytes()
        mine, there = owner.gradient, self._counted.get(key)
        if there is not None and there.storage() is storage:
            if there.away:
                self._come_back(there)
            self.drop(owner)
            owner.gradient = there  # two parameters have the same one
            return
        if there is not None and there is not mine:
            self._give_back(there)  # it lay where this one lies, and nobody has told yet
        reference = weakref.ref(storage, functools.partial(self._gone, key) if self._at_once else None)
        counted = mine is not None and mine.owner is owner and self._counted.get(mine.key) is mine
        if mine is not None and counted and (mine.nbytes, mine.tier) == (nbytes, tier):
            del self._counted[mine.key]  # as large as the one before it: nothing to tell
            mine.key, mine.storage = key, reference
            self._counted[key] = mine
            return
        self.drop(owner)
        owner.gradient = self._counted[key] = Whole(owner=owner, key=key, nbytes=nbytes, tier=tier, storage=reference)
        self._recorder.memory(nbytes, tier, Category.GRADIENT, module=owner.row, key=key)

    def _gone(self, key: int, storage: weakref.ref[Any]) -> None:
        whole = self._counted.get(key)
        if whole is not None and whole.storage is storage:
            self._give_back(whole)

    def _come_back(self, whole: Whole) -> None:
        whole.away = False
        self._recorder.memory(whole.nbytes, whole.tier, Category.GRADIENT, module=whole.owner.row, key=whole.key)

    def _give_back(self, whole: Whole) -> None:
        if self._counted.get(whole.key) is not whole:
            return
        del self._counted[whole.key]
        if not whole.away:
            self._recorder.memory(-whole.nbytes, whole.tier, Category.GRADIENT, module=whole.owner.row)
