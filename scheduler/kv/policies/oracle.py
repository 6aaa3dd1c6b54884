"""The best choice there is, at the price of reading every key."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .base import Base, over_group, probabilities
from .keeping import everything, token_candidates
from .policy import Keys, Query, Selection


class Oracle(Base):
    """The tokens that get most attention, by computing it: a bound for others. It saves half of the bytes at most."""

    name: ClassVar[str] = "oracle"
    summary: ClassVar[str] = "what gets most attention, found by reading every key"
    reads_all_keys: bool = True

    def select(self, query: Query, keys: Keys) -> Selection:
        """See `Policy`."""
        among = token_candidates(self.setting, query.tokens)
        if among is None:
            return everything(self.heads.kv_heads, query.tokens)
        ids = np.arange(query.tokens)
        rows = np.stack([keys.rows(head, ids) for head in range(self.heads.kv_heads)])
        mass = over_group(probabilities(query, query.values @ rows.transpose(0, 2, 1)))
        nbytes = self.heads.kv_heads * query.tokens * self.heads.key_nbytes
        return among.select(mass[:, among.start : among.stop], unit_tokens=1, scored_nbytes=nbytes)
