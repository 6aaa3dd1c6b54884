"""Records of what happened. The simulator writes the same schema for what it says would happen."""

from __future__ import annotations

from collections import deque
from typing import Final, Literal

import msgspec

Kind = Literal["read", "copy", "wait", "demand", "mismatch", "relearn", "error"]

CAPACITY: Final = 1 << 16


class Record(msgspec.Struct, frozen=True, kw_only=True, tag="record"):
    """One span of time on one track."""

    kind: Kind
    block: int
    """Id of the block concerned; -1 where none is."""
    start_ns: int
    end_ns: int
    nbytes: int = 0
    note: str = ""


class Timeline:
    """A bounded ring of records: the oldest are dropped first, and the loss is counted."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._records: deque[Record] = deque(maxlen=capacity)
        self.dropped = 0

    def add(self, record: Record) -> None:
        """Append a record (safe from any thread)."""
        if len(self._records) == self._records.maxlen:
            self.dropped += 1
        self._records.append(record)

    def records(self) -> tuple[Record, ...]:
        """A copy of what is held, oldest first."""
        return tuple(self._records)
