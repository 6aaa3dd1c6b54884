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


class Alisa(Base):
    """k = half of the budget. The last k tokens, and those with the largest sums of attention over the last k queries.

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
        self._steps: deque[Seen] = deque()
        self._queries = 0

    @property
    def window(self) -> int:
        """Queries whose attention is summed."""
        return self.setting.budget_tokens // 2

    def appended(self, keys: FloatArray) -> None:
        """See `Policy`."""
        self._sums.append(np.zeros(keys.shape[:2], np.float32))

    def attended(self, seen: Seen) -> None:
        """See `Policy`."""
        seen = _below(seen, self._sums.length)  # some may have been cropped since
        self._steps.append(seen)
        self._queries += seen.queries
        self._add(seen, 1)
        while self._queries - self._steps[0].queries >= self.window:
            oldest = self._steps.popleft()
            self._queries -= oldest.queries
            self._add(oldest, -1)

    def cropped(self, tokens: int, keys: Keys) -> None:
        """See `Policy`."""
        self._sums.crop(tokens)
        self._steps = deque(_below(seen, tokens) for seen in self._steps)

    def select(self, query: Query, keys: Keys) -> Selection:
        """See `Policy`."""
        among = token_candidates(self.setting, query.tokens)
        if among is None:
            return everything(self.heads.kv_heads, query.tokens)
        sums = self._sums.values[:, among.start : among.stop]
        return among.select(sums, unit_tokens=1, scored_nbytes=sums.nbytes)

    def _add(self, seen: Seen, sign: int) -> None:
        for head, (tokens, mass) in enumerate(zip(seen.tokens, seen.mass, strict=True)):
            self._sums.values[head, tokens] += sign * mass


def _below(seen: Seen, count: int) -> Seen:
    """Without tokens from `count` on, whose numbers others have later."""
    kept = [tokens < count for tokens in seen.tokens]
    return replace(
        seen,
        tokens=tuple(tokens[there] for tokens, there in zip(seen.tokens, kept, strict=True)),
        mass=tuple(mass[there] for mass, there in zip(seen.mass, kept, strict=True)),
    )
