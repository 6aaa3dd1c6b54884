"""SparQ: keys by the channels in which the query is large (arXiv 2312.04985)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .base import Base, over_group
from .keeping import best, everything, token_candidates
from .policy import FloatArray, Heads, IntArray, Keys, Query, Selection, Setting

PART = 4
"""One channel of so many is read."""


class SparQ(Base):
    """Scores of all tokens from the r largest |q| alone, then the whole keys of the best tokens.

    A second copy of the keys, arranged by channel, is what makes it save bytes: r channels of all tokens are contiguous
    then. The paper's correction by the mean value is not made here: it changes the result, not the choice.
    """

    name: ClassVar[str] = "sparq"
    summary: ClassVar[str] = "what scores most in the channels where the query is large"
    reads_all_keys: bool = True

    def __init__(self, heads: Heads, setting: Setting) -> None:
        super().__init__(heads, setting)
        self.channels = max(1, heads.dim // PART)

    def select(self, query: Query, keys: Keys) -> Selection:
        """See `Policy`."""
        among = token_candidates(self.setting, query.tokens)
        if among is None:
            return everything(self.heads.kv_heads, query.tokens)
        scores = []
        for head, rows in enumerate(query.values):
            channels = best(np.abs(rows).sum(axis=0), self.channels)
            parts = keys.channels(head, channels, among.start, among.stop)
            scores.append(_estimated(rows, channels, parts))
        tokens = among.stop - among.start
        nbytes = self.heads.kv_heads * tokens * self.channels * self.heads.itemsize
        return among.select(over_group(np.stack(scores)), unit_tokens=1, scored_nbytes=nbytes)


def _estimated(rows: FloatArray, channels: IntArray, parts: FloatArray) -> FloatArray:
    """Estimated attention [rows, tokens]: the temperature is that of the part of |q| that is looked at."""
    size = np.abs(rows)
    share = size[:, channels].sum(axis=1) / np.maximum(size.sum(axis=1), 1e-30)
    logits = rows[:, channels] @ parts.T / np.sqrt(rows.shape[1] * np.maximum(share, 1e-30))[:, None]
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    estimated: FloatArray = weights / weights.sum(axis=1, keepdims=True)
    return estimated
