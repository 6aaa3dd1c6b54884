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
LOOK_TOKENS = 1024
"""Whose scores are there at once, about: all queries of a block have one for each token."""


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
        of_blocks = self._of_blocks(query)
        kept = np.concatenate([of_blocks[:, :, : among.start], of_blocks[:, :, among.stop :]], axis=-1)
        shares = (of_blocks[:, :, among.start : among.stop] - _log_sum(kept)[:, :, None]).max(axis=1)
        ids = []
        for row in shares:
            worth = np.flatnonzero(row >= np.log(THRESHOLD))
            order = worth[np.argsort(-row[worth], kind="stable")][: among.room]
            ids.append(among.with_kept(order + among.start))
        nbytes = self._codes[:, : query.tokens].nbytes + self._scales[:, : query.tokens].nbytes
        return Selection(ids=tuple(ids), unit_tokens=self.setting.block_tokens, scored_nbytes=nbytes)

    def _of_blocks(self, query: Query) -> FloatArray:
        """Logarithms of what each block gets from each query, not normalised: [kv_heads, rows, blocks]."""
        size, dim = self.setting.block_tokens, self.heads.dim
        found = []
        step = max(1, LOOK_TOKENS // size) * size
        for first in range(0, query.tokens, step):
            some = slice(first, min(first + step, query.tokens))
            keys = restored(self._codes[:, some], self._scales[:, some], dim)
            scores = query.values @ keys.transpose(0, 2, 1) / np.float32(np.sqrt(dim))
            beyond = -scores.shape[2] % size
            scores = np.pad(scores, ((0, 0), (0, 0), (0, beyond)), constant_values=-np.inf)
            found.append(_log_sum(scores.reshape(*scores.shape[:2], -1, size)))
        of_blocks: FloatArray = np.concatenate(found, axis=-1)
        return of_blocks


def _log_sum(scores: FloatArray) -> FloatArray:
    """The logarithm of the sum of exponentials over the last axis, one of which is finite."""
    most = scores.max(axis=-1)
    logs: FloatArray = most + np.log(np.exp(scores - most[..., None]).sum(axis=-1))
    return logs


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
