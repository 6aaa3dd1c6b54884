"""SnapKV: what the end of the prompt attended to (arXiv 2404.14469), recallable."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .base import Base
from .growing import Growing
from .keeping import everything, token_candidates
from .policy import FloatArray, Heads, Keys, Query, Seen, Selection, Setting

POOL = 7
"""Neighbours of a token that matters are kept, too: votes are the largest of so many."""


class SnapKv(Base):
    """The last queries of a prompt vote; their votes hold until the next prompt, whose last queries vote anew.

    The paper deletes what was not chosen, and the second question finds nothing. Here nothing is deleted.
    """

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "what the last queries of the prompt attended to"
    hears_prompts: bool = True

    def __init__(self, heads: Heads, setting: Setting) -> None:
        super().__init__(heads, setting)
        self._votes = Growing(heads.kv_heads)

    def appended(self, keys: FloatArray) -> None:
        """See `Policy`."""
        self._votes.append(np.zeros(keys.shape[:2], np.float32))

    def attended(self, seen: Seen) -> None:
        """See `Policy`."""
        if not seen.prompt:
            return
        self._votes.values[:] = 0
        for head, (tokens, mass) in enumerate(zip(seen.tokens, seen.mass, strict=True)):
            self._votes.values[head, tokens] = mass
        self._votes.values[:] = pooled(self._votes.values, POOL)

    def cropped(self, tokens: int, keys: Keys) -> None:
        """See `Policy`."""
        self._votes.crop(tokens)

    def select(self, query: Query, keys: Keys) -> Selection:
        """See `Policy`."""
        among = token_candidates(self.setting, query.tokens)
        if among is None:
            return everything(self.heads.kv_heads, query.tokens)
        votes = self._votes.values[:, among.start : among.stop]
        return among.select(votes, unit_tokens=1, scored_nbytes=votes.nbytes)


def pooled(values: FloatArray, width: int) -> FloatArray:
    """The largest of `width` neighbours, an odd number, of [heads, tokens]."""
    side = width // 2
    padded = np.pad(values, ((0, 0), (side, side)), constant_values=-np.inf)
    largest: FloatArray = np.lib.stride_tricks.sliding_window_view(padded, width, axis=1).max(axis=-1)
    return largest
