"""Everything: no selection."""

from __future__ import annotations

from typing import ClassVar

from .base import Base
from .keeping import everything
from .policy import Keys, Query, Selection


class Exact(Base):
    """All keys, always."""

    name: ClassVar[str] = "exact"
    summary: ClassVar[str] = "everything: the only one that is not lossy"

    def select(self, query: Query, keys: Keys) -> Selection:
        """See `Policy`."""
        return everything(self.heads.kv_heads, query.tokens)
