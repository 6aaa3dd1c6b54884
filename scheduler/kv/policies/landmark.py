"""Mean landmarks: blocks by what their mean key scores (ShadowKV's scoring, arXiv 2410.21465)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .base import Base, over_group, probabilities
from .growing import BlockFacts
from .keeping import block_candidates, everything, require_blocks
from .policy import FloatArray, Heads, Keys, Query, Selection, Setting


class Landmark(Base):
    """Of each block the mean key is kept, half of what Quest keeps. A single key that matters drowns in it."""

    name: ClassVar[str] = "landmark"
    summary: ClassVar[str] = "blocks by what their mean key scores"

    def __init__(self, heads: Heads, setting: Setting) -> None:
        super().__init__(heads, setting)
        require_blocks(setting)
        self._means = BlockFacts(heads, setting.block_tokens, _mean, heads.dim)

    def appended(self, keys: FloatArray) -> None:
        """See `Policy`."""
        self._means.append(keys)

    def cropped(self, tokens: int, keys: Keys) -> None:
        """See `Policy`."""
        self._means.crop(tokens, keys)

    def select(self, query: Query, keys: Keys) -> Selection:
        """See `Policy`."""
        among = block_candidates(self.setting, query.tokens)
        if among is None:
            return everything(self.heads.kv_heads, query.tokens)
        means = self._means.values[:, among.start : among.stop]
        if not means.shape[1]:
            scores: FloatArray = np.zeros((self.heads.kv_heads, 0), np.float32)
        else:
            scores = over_group(probabilities(query, query.values @ means.transpose(0, 2, 1)))
        return among.select(scores, unit_tokens=self.setting.block_tokens, scored_nbytes=means.nbytes)


def _mean(block: FloatArray) -> FloatArray:
    mean: FloatArray = block.mean(axis=1)
    return mean
