"""The ring: where hooks leave records until the writer fetches them."""

from __future__ import annotations

import functools
import itertools
import os
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Final

from ...memory.errors import UsageError
from .schema import Record

MIB: Final = 2**20
RECORD_NBYTES: Final = 352
"""What a large record takes with its place in the ring: a transfer, all of whose numbers are objects of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RingStatistics:
    """Counts since the ring was made: recorded = dropped + drained + waiting."""

    recorded: int
    """Records that were appended."""
    dropped: int
    """Of these, lost because the ring was full: always the oldest ones."""
    drained: int
    """Of these, handed on by `drain`."""
    waiting: int
    """Of these, in the ring."""
    capacity: int
    """Records that the ring holds at most."""


class Ring:
    """A bounded queue of records that never makes a hook wait: when it is full, the oldest record is lost and counted.

    `append` takes no lock, so that it may be called from any thread, and from a finalizer or a signal handler that
    interrupts any method here. Each operation on a deque or a count is atomic, and what is counted is only what leaves
    the ring. A forked child starts with an empty one: the records in it are its parent's.
    """

    def __init__(self, capacity_nbytes: int = 64 * MIB) -> None:
        """
        Raises:
            UsageError: not one record fits.
        """
        if capacity_nbytes < RECORD_NBYTES:
            raise UsageError(
                f"a ring of {capacity_nbytes} bytes holds no record: it takes {RECORD_NBYTES} bytes each. "
                "Choose a larger buffer, such as 64MiB."
            )
        self._capacity = capacity_nbytes // RECORD_NBYTES
        self._forget()
        os.register_at_fork(after_in_child=functools.partial(_forget_in_child, weakref.ref(self)))

    def append(self, record: Record) -> None:
        """Leave a record; the oldest one goes when there is no room. Thread-safe, and never waits."""
        records = self._records
        records.append(record)
        if len(records) > self._capacity:
            self._drop(records)

    def drain(self) -> list[Record]:
        """Take out what is in the ring now, oldest first. One thread at a time."""
        with self._lock:
            records = self._records
            taken: list[Record] = []
            try:
                # As many as there are now: appending goes on meanwhile, and may be faster.
                for _ in range(len(records)):
                    taken.append(records.popleft())
            except IndexError:
                pass  # an append that found the ring full was faster, and has counted what it dropped
            self._drained += len(taken)
        return taken

    def statistics(self) -> RingStatistics:
        """What came and went so far. Exact for records whose `append` has returned."""
        with self._lock:
            dropped = next(self._drops) - self._reads  # a count cannot be looked at without being moved on
            self._reads += 1
            waiting = len(self._records)
            return RingStatistics(
                recorded=dropped + self._drained + waiting,
                dropped=dropped,
                drained=self._drained,
                waiting=waiting,
                capacity=self._capacity,
            )

    @property
    def waiting(self) -> int:
        """Records in the ring now. Not its length: a ring that is empty must not pass for one that is not there."""
        return len(self._records)

    def _drop(self, records: deque[Record]) -> None:
        try:
            records.popleft()
        except IndexError:
            return  # drained meanwhile: nothing had to go
        next(self._drops)

    def _forget(self) -> None:
        # The lock too: at a fork another thread of the parent may have held it.
        self._lock = threading.Lock()
        self._records: deque[Record] = deque()
        self._drops = itertools.count()
        self._reads = 0
        self._drained = 0


def _forget_in_child(ring: weakref.ref[Ring]) -> None:
    alive = ring()
    if alive is not None:
        alive._forget()
