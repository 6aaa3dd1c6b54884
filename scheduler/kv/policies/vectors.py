"""Tokens by what the codeword of their key scores: retrieval by tables (A²ATS, arXiv 2502.12665)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from .base import Base, over_group
from .codebook import assign, fit_codebook
from .keeping import everything, token_candidates
from .policy import FloatArray, Heads, Keys, Query, Selection, Setting

CODEWORDS = 256
"""So that a token's code is a byte."""


class Vectors(Base):
    """q·c is worked out for 256 codewords, then looked up for every token: a byte read per token.

    The codebook is fitted to typical keys and queries, as the paper has it (`calibrate`), or else to the first keys
    that come; until there are enough of those, all is attended to. The paper also makes keys that are far away free of
    their positions (windowed RoPE), which takes the model's attention and is not here: rotated keys are coded.
    """

    name: ClassVar[str] = "vq"
    summary: ClassVar[str] = "what the codeword of a key scores, looked up in a table"

    def __init__(self, heads: Heads, setting: Setting) -> None:
        super().__init__(heads, setting)
        self._codebooks: FloatArray | None = None
        self._queries: FloatArray | None = None
        self._codes: npt.NDArray[np.uint8] = np.zeros((heads.kv_heads, 0), np.uint8)
        self._waiting: FloatArray = np.zeros((heads.kv_heads, 0, heads.dim), np.float32)

    def calibrate(self, keys: FloatArray, queries: FloatArray) -> None:
        """Fit the codebooks before the first key comes, to keys [kv_heads, tokens, dim] and queries likewise."""
        assert self._codebooks is None, "keys were coded already"
        assert not self._waiting.size, "keys came already"
        self._queries = queries
        self._fit(keys)

    def appended(self, keys: FloatArray) -> None:
        """See `Policy`."""
        self._waiting = np.concatenate([self._waiting, keys.astype(np.float32, copy=False)], axis=1)
        if self._codebooks is None and self._waiting.shape[1] >= 4 * CODEWORDS:
            self._fit(self._waiting)
        if self._codebooks is not None and self._waiting.shape[1]:
            codes = [self._assigned(head) for head in range(self.heads.kv_heads)]
            self._codes = np.concatenate([self._codes, np.stack(codes).astype(np.uint8)], axis=1)
            self._waiting = self._waiting[:, :0]

    def cropped(self, tokens: int, keys: Keys) -> None:
        """See `Policy`."""
        self._codes = self._codes[:, :tokens]
        self._waiting = self._waiting[:, :tokens]

    def select(self, query: Query, keys: Keys) -> Selection:
        """See `Policy`."""
        among = token_candidates(self.setting, query.tokens)
        if among is None or self._codebooks is None:
            return everything(self.heads.kv_heads, query.tokens)
        table = query.values @ self._codebooks.transpose(0, 2, 1)
        codes = self._codes[:, among.start : among.stop]
        scores = np.stack([over_group(table[head : head + 1])[0][codes[head]] for head in range(len(codes))])
        return among.select(scores, unit_tokens=1, scored_nbytes=self._codebooks.nbytes + codes.nbytes)

    def _fit(self, keys: FloatArray) -> None:
        of = [None if self._queries is None else self._queries[head] for head in range(self.heads.kv_heads)]
        books = [fit_codebook(keys[head], CODEWORDS, queries=of[head]) for head in range(self.heads.kv_heads)]
        self._codebooks = np.stack(books)

    def _assigned(self, head: int) -> npt.NDArray[np.int64]:
        assert self._codebooks is not None
        queries = None if self._queries is None else self._queries[head]
        return assign(self._waiting[head], self._codebooks[head], queries=queries)
