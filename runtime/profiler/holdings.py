"""Storages that are accounted for, by what they are: each is counted once, and given back once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .recorder import Recorder
from .schema import Category, Storage, Tier
from .storages import parts_of, storage_key, tier_of

Gone = Callable[[int, weakref.ref[Any]], None]
"""The memory at this address is gone, which may be before its tensor is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A storage that is accounted for."""

    tier: Tier
    nbytes: int
    module: int
    right: Callable[[], bool]
    """Whether it still is what it was counted as: another storage may have come to lie where it was."""
    storage: weakref.ref[Any] | None = None
    """Tells when a weight's memory is gone."""


class Holdings:
    """Keeps the account."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._held: dict[tuple[Category, int], Held] = {}
        """By category and storage."""
        self.known: set[int] = set()
        """Storages of weights and buffers: what autograd saves of them is no activation."""

    def find(self, category: Category, key: int) -> Held | None:
        """What is counted as such at this address."""
        return self._held.get((category, key))

    def holds(self, key: int) -> bool:
        """Whether the storage at this address is counted, as whatever."""
        return key in self.known or (Category.GRADIENT, key) in self._held or (Category.OPTIMIZER, key) in self._held

    def take(self, name: str, tensor: torch.Tensor, category: Category, row: int, gone: Gone | None = None) -> int:
        """Count a weight or a buffer by its name; its storage, or 0 where that is counted already or has no bytes.

        `gone` is told when its memory is.
        """
        parts = [part for part in parts_of(tensor) if storage_key(part)]
        if not parts or storage_key(parts[0]) in self.known:
            return 0
        key, tier = storage_key(parts[0]), tier_of(parts[0])
        nbytes = sum({storage_key(part): part.untyped_storage().nbytes() for part in parts}.values())
        self.known.add(key)
        number = self._recorder.storage(
            Storage(
                names=(name,),
                nbytes=nbytes,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                category=category,
                tier=tier,
                module=row,
            )
        )
        storage = None
        if gone is not None:
            storage = weakref.ref(parts[0].untyped_storage(), lambda ended: gone(key, ended))
        self._held[category, key] = Held(tier=tier, nbytes=nbytes, module=row, right=lambda: True, storage=storage)
        self._recorder.memory(nbytes, tier, category, module=row, storage=number, key=key)
        return key

    def hold(self, category: Category, tensor: torch.Tensor, row: int, right: Callable[[], bool]) -> None:
        """Count a storage, unless it is already; `right` says whether it is it still."""
        key = storage_key(tensor)
        held = self._held.get((category, key))
        if not key or (held is not None and held.right()):
            return
        self.drop(category, key)
        nbytes, tier = tensor.untyped_storage().nbytes(), tier_of(tensor)
        self._held[category, key] = Held(tier=tier, nbytes=nbytes, module=row, right=right)
        self._recorder.memory(nbytes, tier, category, module=row, key=key)

    def drop(self, category: Category, key: int) -> None:
        """A storage is no longer what it was counted as."""
        held = self._held.pop((category, key), None)
        if held is not None:
            if category in (Category.WEIGHT, Category.BUFFER):
                self.known.discard(key)
            self._recorder.memory(-held.nbytes, held.tier, category, module=held.module)
