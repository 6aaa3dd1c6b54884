"""Pieces of differing sizes in one range of bytes: of an arena, or of a file that may grow.

First fit in a sorted list of what is free; neighbours grow together again. What is taken last is mostly given back
first (activations are), so the list stays short.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from .arena import PAGE, round_up


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionStatistics:
    """Bytes of a range."""

    used_nbytes: int
    peak_nbytes: int
    """The most that was used at a time."""
    end_nbytes: int
    """How far it was ever used, gaps included."""


class Regions:
    """Whole pages of a range. Not thread-safe.

    Args:
        nbytes: Of the range; None where it has no end.
    """

    def __init__(self, nbytes: int | None = None) -> None:
        self._limit = None if nbytes is None else nbytes // PAGE * PAGE
        self._free: list[tuple[int, int]] = []
        """(offset, bytes), sorted, apart from each other."""
        self._end = 0
        """What is behind has never been used."""
        self._used = self._peak = self._furthest = 0

    def take(self, nbytes: int) -> int | None:
        """The offset of so many bytes, rounded up to the page; None where there are not so many in one piece."""
        size = round_up(nbytes)
        for place, (offset, free) in enumerate(self._free):
            if free >= size:
                if free == size:
                    del self._free[place]
                else:
                    self._free[place] = offset + size, free - size
                return self._taken(offset, size)
        if self._limit is not None and self._end + size > self._limit:
            return None
        offset, self._end = self._end, self._end + size
        self._furthest = max(self._furthest, self._end)
        return self._taken(offset, size)

    def _taken(self, offset: int, size: int) -> int:
        self._used += size
        self._peak = max(self._peak, self._used)
        return offset

    def give(self, offset: int, nbytes: int) -> None:
        """Give back what `take` gave."""
        size = round_up(nbytes)
        self._used -= size
        place = bisect_left(self._free, (offset, 0))
        if place < len(self._free) and offset + size == self._free[place][0]:
            size += self._free.pop(place)[1]
        if place and sum(self._free[place - 1]) == offset:
            place -= 1
            offset, before = self._free.pop(place)
            size += before
        if offset + size == self._end:
            self._end = offset
        else:
            self._free.insert(place, (offset, size))

    def statistics(self) -> RegionStatistics:
        """A frozen record of the range's use."""
        return RegionStatistics(used_nbytes=self._used, peak_nbytes=self._peak, end_nbytes=self._furthest)
