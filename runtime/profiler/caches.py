"""Bytes of KV caches: each counted from the first call that returns it until it is gone."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch

from .recorder import Recorder
from .schema import Category, Tier
from .storages import tier_of


class CacheWatch:
    """Looks at what calls return. A cache has its own count: models may run in turn, each with its own."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._held: dict[int, tuple[weakref.ref[Any], Tier, int, int]] = {}
        """By id of a cache: itself, tier, bytes, module."""
        self._verified: dict[int, int] = {}
        """By id of a cache on which guesses are checked: the tokens in it before the last call."""

    def gained(self, cache: Any, tokens: int, *, verifies: bool) -> int:
        """Tokens per sequence that a call made, having been given so many.

        How many guesses were right shows in the cache of the next call: a check makes what the one before it added.
        """
        key = id(cache)
        if not verifies and key not in self._verified:
            return 1
        length = getattr(cache, "get_seq_length", lambda: None)()
        if not isinstance(length, int):  # a tensor, which is not worth waiting for a device
            return 1
        before, self._verified[key] = self._verified.get(key, length - tokens - 1), length - tokens
        return max(length - tokens - before, 1)

    def look(self, result: Any, row: int) -> None:
        """Account for the cache that a call of a root returned, if it did."""
        cache = getattr(result, "past_key_values", None)
        tensors = list(kv_tensors(cache))
        if not tensors:
            return
        key = id(cache)
        known = self._held.get(key)
        if known is None:
            tier = tier_of(tensors[0])
            known = weakref.ref(cache, lambda _: self._gone(key)), tier, 0, row
        reference, tier, before, row = known
        nbytes = sum(tensor.nbytes for tensor in tensors)
        if nbytes != before:
            self._held[key] = reference, tier, nbytes, row
            self._recorder.memory(nbytes - before, tier, Category.KV, module=row)

    def held_before(self, cache: Any, tokens: int) -> bool:
        """Whether a cache held any tokens before a call that has just given it so many."""
        length = getattr(cache, "get_seq_length", int)()
        if isinstance(length, int):
            return length > tokens
        return id(cache) in self._held  # a tensor, which is not worth waiting for a device: was it there before?

    def _gone(self, key: int) -> None:
        self._verified.pop(key, None)
        _, tier, nbytes, row = self._held.pop(key)
        self._recorder.memory(-nbytes, tier, Category.KV, module=row)


def kv_tensors(cache: Any) -> Iterator[torch.Tensor]:
    """The tensors of a transformers cache; none of anything else."""
    layers = getattr(cache, "layers", None)
    if layers is None and cache is not None:  # an encoder–decoder's: two caches
        parts = (getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None))
        layers = [layer for part in parts for layer in getattr(part, "layers", ())]
    for layer in layers or ():
        for value in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(value, torch.Tensor):
                yield value
