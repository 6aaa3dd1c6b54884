"""Where sentences end, heard from the token ids that a model is called with: its cache sees keys and no tokens."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ...scheduler.kv.policies.policy import IntArray

if TYPE_CHECKING:
    from .cache import TieredCache


class SentenceEnds:
    """Which positions of a cache end a sentence.

    Args:
        tokens: Ids that do.
    """

    def __init__(self, tokens: Collection[int]) -> None:
        self._tokens = torch.tensor(sorted(tokens), dtype=torch.long)
        self._marks = np.zeros((0, 0), dtype=np.bool_)
        """[rows, positions]; what nobody told of ends nothing."""

    def hear(self, ids: torch.Tensor, before: int) -> None:
        """Token ids [rows, n] at the positions behind the first `before`; what was known of these is over."""
        marks = torch.isin(ids.detach().cpu(), self._tokens).numpy()
        known = np.zeros((len(marks), before), dtype=np.bool_)
        if len(self._marks) == len(marks):
            kept = self._marks[:, :before]
            known[:, : kept.shape[1]] = kept
        self._marks = np.concatenate([known, marks], axis=1)

    def within(self, row: int, start: int, stop: int) -> IntArray:
        """Positions of a row from `start` to before `stop` that end a sentence, ascending."""
        if row >= len(self._marks):
            return np.zeros(0, dtype=np.int64)
        found: IntArray = np.flatnonzero(self._marks[row, start:stop]) + start
        return found


def listen(model: nn.Module, cache: TieredCache, ends: SentenceEnds) -> None:
    """Have `ends` hear what a model is called with beside a cache, as long as there is one.

    A call by embeddings tells nothing: no sentence ends there.
    """
    heard = weakref.ref(cache)

    def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own = heard()
        ids = kwargs.get("input_ids", args[0] if args else None)
        is_ours: bool = kwargs.get("past_key_values") is own
        if own is not None and is_ours and isinstance(ids, torch.Tensor):
            ends.hear(ids, int(own.get_seq_length()))

    handle = model.register_forward_pre_hook(hear, with_kwargs=True)
    weakref.finalize(cache, handle.remove)
