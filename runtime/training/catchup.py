"""Experts that are behind catch up: those that a router asks for, before they compute, and all before a commit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ...memory.arena import Slot
from ..build import Machinery
from ..experts.implementation import AROUND, put_back, take_over
from ..experts.layers import fused_parts
from ..experts.runner import register
from .owing import Owed, Owing, OwingStatistics
from .trained import Trained
from .updater import Updater


class CatchUp:
    """Makes updates that shards owe.

    A parameter that is behind is caught by the session wherever it is used (`Session.arrears`), except by the function
    of transformers that computes experts, for which those are brought up to date that its tokens have chosen.

    Args:
        machinery: What runs the model.
        trained: In their order.
        owing: Which shards owe.
        updater: Makes updates.
    """

    def __init__(self, machinery: Machinery, trained: Sequence[Trained], owing: Owing, updater: Updater) -> None:
        self._session = machinery.session
        self._owing = owing
        self._updater = updater
        self._number = {id(trained[index].parameter): index for index in owing.parameters}
        self._blocks = owing.parameters
        self._turn = threading.RLock()
        """Held from asking what is owed until it has been made: who comes next finds it made."""
        self._making: int | None = None
        """The block that it is being made for: nobody owes it any more, and its rows are being written."""
        self._configs: list[Any] = []
        """Those in which our name stands."""
        self._modules: list[nn.Module] = []
        machinery.session.arrears = self

    def install(self, model: nn.Module) -> None:
        """Have transformers call this for the layers whose experts may be behind."""
        register()
        for child in model.modules():
            parts = [part for part in fused_parts(child) or () if id(part) in self._number]
            if not parts:
                continue
            around: Callable[[torch.Tensor], AbstractContextManager[None]] = partial(self._used, parts)
            child.__dict__[AROUND] = around
            self._modules.append(child)
            config: Any = child.__dict__["config"]
            if not any(config is known for known in self._configs):
                take_over(config)
                self._configs.append(config)

    def behind(self, parameter: nn.Parameter) -> bool:
        """Whether experts of a parameter are, or are being brought up to date just now."""
        number = self._number.get(id(parameter))
        # In this order: what is not owed any more is being made by then.
        return number is not None and (self._owing.behind(number) or self._making == self._blocks[number])

    @contextmanager
    def _used(self, parts: Sequence[nn.Parameter], chosen: torch.Tensor) -> Iterator[None]:
        """Some parameters are about to be used by the experts that tokens have chosen, and by no others."""
        session = self._session
        late = [part for part in parts if self.behind(part) and session.bindings[self._block(part)].uses]
        if late and not session.saved.runs_again:  # else they have been brought up to date
            with session.saved.unnoticed():
                experts = set(chosen.detach().reshape(-1).tolist())
            for block in dict.fromkeys(self._block(part) for part in late):
                slot = session.bindings[block].slot
                assert slot is not None, f"block {block} is lent from the other tier"
                needed = {self._number[id(part)]: experts for part in late if self._block(part) == block}
                self._catch_up(block, partial(self._owing.settle, block, needed), slot)
        for part in late:
            session.appear(part)
        try:
            yield
        finally:
            for part in late:
                if self.behind(part):
                    session.vanish(part)

    def _block(self, part: nn.Parameter) -> int:
        return self._blocks[self._number[id(part)]]

    def settle(self, block: int, slot: Slot) -> None:
        """Have all updates made that a block owes, which is leased there."""
        self._catch_up(block, partial(self._owing.settle, block), slot)

    def _catch_up(self, block: int, settle: Callable[[], Owed], lent: Slot) -> None:
        """Have updates made where a block is leased: who asks meanwhile is told that it is behind, and waits here."""
        with self._turn:
            self._making = block
            try:
                self._updater.catch_up(block, settle, lent=lent)
            finally:
                self._making = None

    def drain(self) -> None:
        """Have all updates made that are owed, after those that are under way; returns before they have been.

        Raises:
            PenstockError: what an update before met.
        """
        session = self._session
        for block in dict.fromkeys(home for number, home in self._blocks.items() if self._owing.behind(number)):
            if session.running_here():  # who has the block may be the caller
                lease = session.executor.acquire(block, observed=False)
                try:
                    session.bring_up_to_date(block, lease.residence.slot)
                finally:
                    session.executor.release(lease, session.device.computed())
                continue
            with self._turn:
                self._updater.catch_up(block, partial(self._owing.settle, block))

    def statistics(self) -> OwingStatistics:
        """What has been left out so far, and made since."""
        return self._owing.statistics()

    def close(self) -> None:
        """Leave transformers alone from now on."""
        while self._modules:
            self._modules.pop().__dict__.pop(AROUND, None)
        while self._configs:
            put_back(self._configs.pop())
