"""Sparse prefill by low-bit estimates, after SALE (arXiv 2505.24179): blocks of keys for a block of queries."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from .base import Base
from .keeping import block_candidates, everything, require_blocks
from .policy import FloatArray, Heads, Keys, Query, Selection, Setting

THRESHOLD = 0.004
"""Of the attention that first and last tokens get: a block that gets less from every query is left out."""


class Sale(Base):
    """Keys are kept in 4 bits beside the full ones. A block of queries attends to those blocks of keys that, by that
    estimate, get at least `THRESHOLD` of what sinks and recent tokens get from one of the queries; the budget is a
    limit, and not a goal: where attention is concentrated less is read.

    Queries come as rows of `Query.values`, all heads of a group and all queries of a block. They are those of a prompt;
    in decoding it is the same with one query.
    """

    name: ClassVar[str] = "sale"
    summary: ClassVar[str] = "blocks that get a part of attention by 4-bit estimates: for prompts"
    for_prompts: bool = True

    def __init__(self, heads: Heads, setting: Setting) -> None:
        super().__init__(heads, setting)
        require_blocks(setting)
        self._codes: npt.NDArray[np.uint8] = np.zeros((heads.kv_heads, 0, -(-heads.dim // 2)), np.uint8)
        self._scales: FloatArray = np.zeros((heads.kv_heads, 0), np.float32)

    def appended(self, keys: FloatArray) -> None:
        """See `Policy`."""
        codes, scales = quantised(keys)
        self._codes = np.concatenate([self._codes, codes], axis=1)
        self._scales = np.concatenate([self._scales, scales], axis=1)

    def cropped(self, tokens: int, keys: Keys) -> None:
        """See `Policy`."""
        self._codes = self._codes[:, :tokens]
        self._scales = self._scales[:, :tokens]

    def select(self, query: Query, keys: Keys) -> Selection:
        """See `Policy`."""
        among = block_candidates(self.setting, query.tokens)
        if among is None:
            return everything(self.heads.kv_heads, query.tokens)
        codes, scales = self._codes[:, : query.tokens], self._scales[:, : query.tokens]
        size, dim = self.setting.block_tokens, self.heads.dim
        logits = query.values @ restored(codes, scales, dim).transpose(0, 2, 1) / np.float32(np.sqrt(dim))
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        middle = weights[:, :, among.start * size : among.stop * size]
        kept = weights.sum(axis=-1) - middle.sum(axis=-1)
        blocks = middle.reshape(*middle.shape[:2], among.stop - among.start, size).sum(axis=-1)
        shares = (blocks / np.maximum(kept, 1e-30)[:, :, None]).max(axis=1)
        ids = []
        for row in shares:
            worth = np.flatnonzero(row >= THRESHOLD)
            order = worth[np.argsort(-row[worth], kind="stable")][: among.room]
            ids.append(among.with_kept(order + among.start))
        return Selection(ids=tuple(ids), unit_tokens=size, scored_nbytes=codes.nbytes + scales.nbytes)


def quantised(keys: FloatArray) -> tuple[npt.NDArray[np.uint8], FloatArray]:
    """Keys [heads, tokens, dim] in 4 bits, [heads, tokens, dim / 2], and a scale for each, [heads, tokens]."""
    scales = np.maximum(np.abs(keys).max(axis=-1), 1e-30).astype(np.float32) / np.float32(7)
    levels = (np.rint(keys / scales[:, :, None]) + 8).astype(np.uint8)
    if levels.shape[-1] % 2:
        levels = np.concatenate([levels, np.full_like(levels[:, :, :1], 8)], axis=-1)
    return levels[:, :, 0::2] | levels[:, :, 1::2] << 4, scales


def restored(codes: npt.NDArray[np.uint8], scales: FloatArray, dim: int) -> FloatArray:
    """What `quantised` left of keys: [heads, tokens, dim]."""
    levels = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)[:, :, :dim]
    found: FloatArray = (levels.astype(np.float32) - np.float32(8)) * scales[:, :, None]
    return found
