"""Records of what happened. The simulator writes the same schema for what it says would happen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Literal

import msgspec

Kind = Literal["read", "copy", "wait", "use", "demand", "mismatch", "relearn", "exchange", "error"]
"""A use is only told to a listener: there are too many of them to keep."""

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
    issued_ns: int = -1
    """When a transfer was decided; of a use: when the transfer that brought the block was."""
    urgent: bool = False
    """Whether a consumer waited for it when it was decided."""


class Timeline:
    """A bounded ring of records: the oldest are dropped first, and the loss is counted."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._records: deque[Record] = deque(maxlen=capacity)
        self.dropped = 0
        self.listener: Callable[[Record], None] | None = None
        """Is told every record when it is made, in whatever thread that is, and must be quick."""

    def add(self, record: Record) -> None:
        """Append a record (safe from any thread)."""
        if len(self._records) == self._records.maxlen:
            self.dropped += 1
        self._records.append(record)
        listener = self.listener  # looked at once: another thread may take it away at any moment
        if listener is not None:
            listener(record)

    def records(self) -> tuple[Record, ...]:
        """A copy of what is held, oldest first."""
        return tuple(self._records)
