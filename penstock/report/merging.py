"""Few enough spans to draw: those narrower than a pixel become one, and it says how many it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..runtime.profiler.profile import Column

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Spans, sorted by start; each is one of the originals, or stands for several."""

    start: Column
    """In ticks."""
    end: Column
    pick: Column
    """Row of the original; of the longest one where there are several."""
    count: Column
    """How many originals."""
    fill: Column
    """How much of the span they cover, of 255."""
    total: Column
    """Sum of the originals' weights."""
    width: int
    """Spans shorter than this many ticks were merged; 0 where none were."""
    exact: Sequence[tuple[int, int]] = ()
    """Stretches of time in which nothing was merged."""


def merge(
    start: Column,
    end: Column,
    key: Column,
    *,
    weight: Column,
    most: int,
    exact: Sequence[tuple[int, int]] = (),
) -> Merged:
    """At most about `most` spans (in ticks): neighbours of one key that are narrower than a common width are merged.

    The width is the least power of two that is wide enough. Spans that touch a stretch of `exact` stay as they are.
    """
    order = np.lexsort((start, key))
    start, end, key, weight = start[order], end[order], key[order], weight[order]
    if len(start) <= most:
        again = np.argsort(start, kind="stable")
        ones = np.ones(len(start), dtype=np.int64)
        return Merged(
            start=start[again],
            end=end[again],
            pick=order[again],
            count=ones,
            fill=ones * 255,
            total=weight[again],
            width=0,
        )
    exact, free = _afforded(start, end, exact, most // 2)
    width, narrow = _width(start, end, key, free, most)
    groups = _groups(start, end, key, weight, narrow, width)
    wide = ~narrow
    ones = np.ones(int(wide.sum()), dtype=np.int64)
    parts = (
        (start[wide], groups.start),
        (end[wide], groups.end),
        (order[wide], order[groups.pick]),
        (ones, groups.count),
        (ones * 255, groups.fill),
        (weight[wide], groups.total),
    )
    joined = [np.concatenate(pair) for pair in parts]
    again = np.argsort(joined[0], kind="stable")
    first, last, pick, count, fill, total = (part[again] for part in joined)
    return Merged(start=first, end=last, pick=pick, count=count, fill=fill, total=total, width=width, exact=exact)


def _afforded(
    start: Column, end: Column, exact: Sequence[tuple[int, int]], most: int
) -> tuple[tuple[tuple[int, int], ...], Mask]:
    """Those stretches whose spans are few enough to keep, and which spans lie outside them."""
    free = np.ones(len(start), dtype=bool)
    kept = []
    for low, high in exact:
        still = free & ((end < low) | (start > high))
        if len(start) - int(still.sum()) <= most:
            kept.append((low, high))
            free = still
    return tuple(kept), free


def _width(start: Column, end: Column, key: Column, free: Mask, most: int) -> tuple[int, Mask]:
    # Rows are sorted by key and start, so groups are runs of equal (key, start // width): counted without sorting.
    extent = max(1, int(end.max()) - int(start.min()))
    width = 1 << max(0, (extent // max(1, most)).bit_length() - 1)
    while True:
        narrow = (end - start < width) & free
        bins, keys = start[narrow] // width, key[narrow]
        groups = 1 + int(((bins[1:] != bins[:-1]) | (keys[1:] != keys[:-1])).sum()) if len(bins) else 0
        kept = len(start) - len(bins) + groups
        if kept <= most or width > extent:
            return width, narrow
        width *= 2


def _groups(start: Column, end: Column, key: Column, weight: Column, narrow: Mask, width: int) -> Merged:
    rows = np.flatnonzero(narrow)
    if not len(rows):
        none = np.zeros(0, dtype=np.int64)
        return Merged(start=none, end=none, pick=none, count=none, fill=none, total=none, width=width)
    bins, keys = start[rows] // width, key[rows]
    first = np.concatenate(([0], 1 + np.flatnonzero((bins[1:] != bins[:-1]) | (keys[1:] != keys[:-1]))))
    count = np.diff(np.append(first, len(rows)))
    length = (end - start)[rows]
    longest = np.repeat(np.maximum.reduceat(length, first), count)
    candidates = np.flatnonzero(length == longest)[::-1]
    pick = np.empty(len(first), dtype=np.int64)
    pick[np.repeat(np.arange(len(first)), count)[candidates]] = rows[candidates]  # the earliest wins: it comes last
    begins = start[rows][first]
    ends = np.maximum.reduceat(end[rows], first)
    covered = np.add.reduceat(length, first)
    fill = np.clip(covered * 255 // np.maximum(1, ends - begins), 1, 255)
    total = np.add.reduceat(weight[rows], first)
    return Merged(start=begins, end=ends, pick=pick, count=count, fill=fill, total=total, width=width)


def pack(start: Column, end: Column, *, most: int) -> tuple[Column, int]:
    """Rows for overlapping spans (sorted by start), so that those of one row do not overlap; and how many rows.

    Every span goes to the first row that is free. Where more than `most` overlap, the last ones share a row.
    """
    rows = np.zeros(len(start), dtype=np.int64)
    free: list[int] = []
    for number, (first, last) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        row = next((i for i, until in enumerate(free) if until <= first), len(free))
        if row == len(free):
            if row < most:
                free.append(last)
            else:
                row = min(range(most), key=free.__getitem__)
        free[row] = max(free[row], last)
        rows[number] = row
    return rows, len(free)
