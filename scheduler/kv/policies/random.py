"""Drawn at random: what a policy has to beat."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .base import Base
from .keeping import everything, token_candidates
from .policy import Heads, Keys, Query, Selection, Setting

SEED = 20260101


class Random(Base):
    """Other tokens in each step, the same ones in each run."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "drawn anew in each step: what others have to beat"

    def __init__(self, heads: Heads, setting: Setting) -> None:
        super().__init__(heads, setting)
        self._draw = np.random.default_rng(SEED)

    def select(self, query: Query, keys: Keys) -> Selection:
        """See `Policy`."""
        among = token_candidates(self.setting, query.tokens)
        if among is None:
            return everything(self.heads.kv_heads, query.tokens)
        scores = self._draw.random((self.heads.kv_heads, among.stop - among.start), np.float32)
        return among.select(scores, unit_tokens=1, scored_nbytes=0)
