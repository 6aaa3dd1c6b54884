"""ALISA's sparse window: what the last queries attended to, and as many recent tokens (arXiv 2403.17312)."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import ClassVar

import numpy as np

from .base import Base
from .growing import Growing
from .keeping import everything, token_candidates
from .policy import FloatArray, Heads, Keys, Query, Seen, Selection, Setting

PARTS = 8
"""Of the window, each with a sum of its own. The oldest is forgotten as a whole."""


class Alisa(Base):
    """k = half of the budget. The last k tokens, and those with the largest sums of attention over the last k queries.

    The window moves by an eighth of itself: sums are over the last 7/8 of k to k queries, and take 4 bytes per token
    and part instead of a record of each query. Queries that came together stay together.

    Unlike H2O's, sums forget: what mattered long ago leaves. The paper's policy, which keeps part of the tokens by
    computing them again, is a matter of cost, not of choice.
    """

    name: ClassVar[str] = "alisa"
    summary: ClassVar[str] = "what the last queries attended to, and as many recent tokens"
    hears_prompts: bool = True
    hears_steps: bool = True

    def __init__(self, heads: Heads, setting: Setting) -> None:
        half = replace(setting, recent=max(setting.recent, setting.budget_tokens // 2 - setting.sinks))
        super().__init__(heads, half)
        self._sums = Growing(heads.kv_heads)
        """Over all parts."""
        self._newest = Growing(heads.kv_heads)
        self._newest_queries = 0
        self._older: deque[tuple[int, FloatArray]] = deque()
        """Queries of each, and their sums, [kv_heads, tokens that there were then]; the oldest first."""

    @property
    def window(self) -> int:
        """Queries whose attention is summed, at most, but for those of one call."""
        return self.setting.budget_tokens // 2

    def appended(self, keys: FloatArray) -> None:
        """See `Policy`."""
        for sums in (self._sums, self._newest):
            sums.append(np.zeros(keys.shape[:2], np.float32))

    def attended(self, seen: Seen) -> None:
        """See `Policy`."""
        if self._newest_queries * PARTS >= self.window:
            self._older.append((self._newest_queries, self._newest.values.copy()))
            self._newest.values[:] = 0
            self._newest_queries = 0
        self._newest_queries += seen.queries
        self._forget()
        for head, (tokens, mass) in enumerate(zip(seen.tokens, seen.mass, strict=True)):
            there = tokens < self._sums.length  # some may have been cropped since
            for sums in (self._sums, self._newest):
                sums.values[head, tokens[there]] += mass[there]

    def cropped(self, tokens: int, keys: Keys) -> None:
        """See `Policy`."""
        self._sums.crop(tokens)
        self._newest.crop(tokens)
        self._older = deque((queries, sums[:, :tokens]) for queries, sums in self._older)

    def select(self, query: Query, keys: Keys) -> Selection:
        """See `Policy`."""
        among = token_candidates(self.setting, query.tokens)
        if among is None:
            return everything(self.heads.kv_heads, query.tokens)
        sums = self._sums.values[:, among.start : among.stop]
        return among.select(sums, unit_tokens=1, scored_nbytes=sums.nbytes)

    def _forget(self) -> None:
        """Drop the parts that are older than the window, and add up what is left: subtracting would leave rounding."""
        queries = self._newest_queries + sum(queries for queries, _ in self._older)
        before = len(self._older)
        while self._older and (len(self._older) >= PARTS or queries - self._older[0][0] >= self.window):
            queries -= self._older.popleft()[0]
        if len(self._older) == before:
            return
        self._sums.values[:] = self._newest.values
        for _, sums in self._older:
            self._sums.values[:, : sums.shape[1]] += sums
