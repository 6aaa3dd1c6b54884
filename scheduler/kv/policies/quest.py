"""Quest: pages by an upper bound of what any of their keys can score (arXiv 2406.10774)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .base import Base, over_group
from .growing import BlockFacts
from .keeping import block_candidates, everything, require_blocks
from .policy import FloatArray, Heads, Keys, Query, Selection, Setting


class Quest(Base):
    """Of each block the least and the largest value of each channel are kept: q·k ≤ Σ_d max(q_d·min_d, q_d·max_d)."""

    name: ClassVar[str] = "quest"
    summary: ClassVar[str] = "blocks by the most that any of their keys can score"

    def __init__(self, heads: Heads, setting: Setting) -> None:
        super().__init__(heads, setting)
        require_blocks(setting)
        self._ranges = BlockFacts(heads, setting.block_tokens, _range, 2, heads.dim)

    def appended(self, keys: FloatArray) -> None:
        """See `Policy`."""
        self._ranges.append(keys)

    def cropped(self, tokens: int, keys: Keys) -> None:
        """See `Policy`."""
        self._ranges.crop(tokens, keys)

    def select(self, query: Query, keys: Keys) -> Selection:
        """See `Policy`."""
        among = block_candidates(self.setting, query.tokens)
        if among is None:
            return everything(self.heads.kv_heads, query.tokens)
        ranges = self._ranges.values[:, among.start : among.stop]
        scores = over_group(upper_bounds(query.values, ranges))
        return among.select(scores, unit_tokens=self.setting.block_tokens, scored_nbytes=ranges.nbytes)


def upper_bounds(query: FloatArray, ranges: FloatArray) -> FloatArray:
    """[kv_heads, rows, dim] and [kv_heads, blocks, 2, dim] → [kv_heads, rows, blocks].

    Of max(q·m, q·M) the second counts where q is positive and the first where it is negative: two products.
    """
    bounds: FloatArray = np.maximum(query, 0) @ ranges[:, :, 1].transpose(0, 2, 1)
    bounds += np.minimum(query, 0) @ ranges[:, :, 0].transpose(0, 2, 1)
    return bounds


def _range(block: FloatArray) -> FloatArray:
    return np.stack([block.min(axis=1), block.max(axis=1)], axis=1)
