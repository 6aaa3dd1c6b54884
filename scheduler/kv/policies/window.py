"""Sinks and a window: the first tokens and the last ones (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .base import Base
from .keeping import everything
from .policy import Keys, Query, Selection


class Window(Base):
    """The budget goes to the last tokens, whatever is asked. Nothing is read in order to choose."""

    name: ClassVar[str] = "window"
    summary: ClassVar[str] = "the first tokens and the last ones"

    def select(self, query: Query, keys: Keys) -> Selection:
        """See `Policy`."""
        tokens, setting = query.tokens, self.setting
        if tokens <= setting.budget_tokens:
            return everything(self.heads.kv_heads, tokens)
        last = np.arange(tokens - setting.budget_tokens + setting.sinks, tokens)
        ids = np.concatenate([np.arange(setting.sinks), last])
        return Selection(ids=(ids,) * self.heads.kv_heads, unit_tokens=1, scored_nbytes=0)
