"""Bytes of what optimizers keep, by the module of the parameter that they keep it for."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from .guard import harmless
from .holdings import Holdings
from .recorder import Recorder
from .schema import Category
from .storages import address, parts_of, storage_key, tensors_in
from .turns import StepTurns


class OptimizerStates:
    """Keeps their records up to date, when it is told to look.

    Args:
        row_of: The module of a parameter.
        turns: Which steps are looked at; in the others nothing is that was looked at before. None: all of them are.
    """

    def __init__(
        self,
        recorder: Recorder,
        holdings: Holdings,
        row_of: Callable[[torch.Tensor], int],
        turns: StepTurns | None,
    ) -> None:
        self._recorder = recorder
        self._holdings = holdings
        self._row_of = row_of
        self._turns = turns
        self._states: dict[int, tuple[weakref.ref[torch.optim.Optimizer], set[int]]] = {}
        """By id of an optimizer: itself, and the storages of what it keeps."""
        self._seen: dict[int, list[int]] = {}
        """By id of an optimizer: the addresses of what it kept when that was looked at."""

    @harmless
    def look_at(self, optimizer: torch.optim.Optimizer) -> None:
        """Account for what an optimizer keeps."""
        number = id(optimizer)
        if self._turns is not None and not self._turns.looking and self._seen.get(number):
            return
        addresses = [address(v) for s in optimizer.state.values() for v in tensors_in(s)]
        if self._seen.get(number) == addresses:
            return
        self._seen[number] = addresses
        if number not in self._states:
            self._states[number] = weakref.ref(optimizer, lambda _: self._gone(number)), set()
        before = self._states[number][1]
        now: set[int] = set()
        for parameter, state in list(optimizer.state.items()):
            row = self._row_of(parameter)
            for value in tensors_in(state):
                if value.numel() > 1:
                    for part in parts_of(value):
                        self._holdings.hold(Category.OPTIMIZER, part, row, lambda: True)
                        now.add(storage_key(part))
        for key in before - now:
            self._holdings.drop(Category.OPTIMIZER, key)
        self._states[number] = self._states[number][0], now

    def _gone(self, number: int) -> None:
        self._seen.pop(number, None)
        for key in self._states.pop(number)[1]:
            self._holdings.drop(Category.OPTIMIZER, key)
