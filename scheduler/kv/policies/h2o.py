"""H2O: heavy hitters by accumulated attention, and as many recent tokens (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from .base import Base
from .growing import Growing
from .keeping import everything, token_candidates
from .policy import FloatArray, Heads, Keys, Query, Seen, Selection, Setting


class H2o(Base):
    """Half of the budget goes to the last tokens, half to those that got most attention so far.

    What was not attended to gets no attention, so who has fallen behind stays there. Unlike the paper's, nothing is
    deleted, and a new prompt, which attends to all, brings it back.
    """

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "what got most attention so far, and as many recent tokens"
    hears_prompts: bool = True
    hears_steps: bool = True

    def __init__(self, heads: Heads, setting: Setting) -> None:
        half = replace(setting, recent=max(setting.recent, setting.budget_tokens // 2 - setting.sinks))
        super().__init__(heads, half)
        self._mass = Growing(heads.kv_heads)

    def appended(self, keys: FloatArray) -> None:
        """See `Policy`."""
        self._mass.append(np.zeros(keys.shape[:2], np.float32))

    def attended(self, seen: Seen) -> None:
        """See `Policy`."""
        for head, (tokens, mass) in enumerate(zip(seen.tokens, seen.mass, strict=True)):
            self._mass.values[head, tokens] += mass

    def cropped(self, tokens: int, keys: Keys) -> None:
        """See `Policy`."""
        self._mass.crop(tokens)

    def select(self, query: Query, keys: Keys) -> Selection:
        """See `Policy`."""
        among = token_candidates(self.setting, query.tokens)
        if among is None:
            return everything(self.heads.kv_heads, query.tokens)
        mass = self._mass.values[:, among.start : among.stop]
        return among.select(mass, unit_tokens=1, scored_nbytes=mass.nbytes)
