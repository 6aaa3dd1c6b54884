"""Sets of instants as sorted, disjoint, half-open intervals, in two arrays. Sums are whole numbers: identities hold.

Nothing here loops over intervals: a set of a million costs a few sorts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def distinct(values: Ints) -> Ints:
    """Each value once, in order. `numpy.unique` hashes since 2.3: several times slower where most values differ."""
    found = np.sort(values)
    return found[np.append(True, found[1:] != found[:-1])] if len(found) else found


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervals:
    """[start[i], end[i]) for all i: none empty, no two touching, in ascending order."""

    start: Ints
    end: Ints

    @staticmethod
    def union(start: npt.NDArray[Any], end: npt.NDArray[Any]) -> Intervals:
        """What any of [start[i], end[i]) covers; those that are empty or run backwards cover nothing."""
        real = end > start
        # Sorted apart: where the i-th start lies beyond the i-th smallest end, as many intervals have ended as have
        # begun, so that nothing covers the instants between the two.
        starts = np.sort(start[real].astype(np.int64, copy=False))
        ends = np.sort(end[real].astype(np.int64, copy=False))
        if not len(starts):
            return Intervals(start=starts, end=ends)
        apart = starts[1:] > ends[:-1]
        return Intervals(
            start=starts[np.concatenate(([True], apart))],
            end=ends[np.concatenate((apart, [True]))],
        )

    @staticmethod
    def one(start: int, end: int) -> Intervals:
        """The single interval [start, end); nothing where that is empty."""
        return Intervals.union(np.array([start], dtype=np.int64), np.array([end], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.start)

    @property
    def length(self) -> int:
        """How long they are together."""
        return int((self.end - self.start).sum())

    def clip(self, start: int, end: int) -> Intervals:
        """The part inside [start, end)."""
        first = int(np.searchsorted(self.end, start, side="right"))
        last = int(np.searchsorted(self.start, end, side="left")) if end > start else first
        return Intervals(
            start=np.maximum(self.start[first:last], start),
            end=np.minimum(self.end[first:last], end),
        )

    def contains(self, points: Ints) -> Mask:
        """Which of these instants lie inside."""
        row: Ints = np.searchsorted(self.start, points, side="right") - 1
        inside = row >= 0
        inside[inside] = points[inside] < self.end[row[inside]]
        return inside

    def before(self, points: Ints) -> Ints:
        """How much lies before each of these instants."""
        total = np.concatenate(([0], np.cumsum(self.end - self.start)))
        begun: Ints = np.searchsorted(self.start, points, side="right")
        result: Ints = total[begun]
        some = begun > 0
        result[some] -= np.maximum(self.end[begun[some] - 1] - points[some], 0)
        return result

    def shared(self, other: Intervals) -> int:
        """The length of the intersection, without making it."""
        return int((other.before(self.end) - other.before(self.start)).sum())

    def cut(self, points: Ints) -> Intervals:
        """The same instants in pieces, none of which has one of these points inside. The pieces touch."""
        edges = distinct(np.concatenate((self.start, self.end, points[self.contains(points)])))
        inside = self.contains(edges[:-1]) if len(edges) else np.zeros(0, dtype=bool)
        return Intervals(start=edges[:-1][inside], end=edges[1:][inside])

    def __or__(self, other: Intervals) -> Intervals:
        return Intervals.union(np.concatenate((self.start, other.start)), np.concatenate((self.end, other.end)))

    def __and__(self, other: Intervals) -> Intervals:
        pieces = self._cut_by(other)
        return pieces._where(other.contains(pieces.start))

    def __sub__(self, other: Intervals) -> Intervals:
        pieces = self._cut_by(other)
        return pieces._where(~other.contains(pieces.start))

    def _cut_by(self, other: Intervals) -> Intervals:
        return self.cut(np.concatenate((other.start, other.end)))

    def _where(self, mask: Mask) -> Intervals:
        return Intervals.union(self.start[mask], self.end[mask])
