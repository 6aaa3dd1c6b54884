"""Who worked when: steps, compute by thread and depth, transfers by link, waits, marks. What the Gantt view draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ..runtime.profiler.profile import Column, Profile
from ..runtime.profiler.schema import Cause, Compute, Link, Mark, Step, Transfer, Wait
from .arrays import Arrays
from .clock import Clock, ranks
from .merging import Merged, merge, pack
from .names import Names

_SHOWN: Final = (Link.H2D, Link.D2H, Link.DISK_READ, Link.DISK_WRITE)
_MOST_LANES: Final = 8
_MOST_DEPTH: Final = 8
_MOST_ROWS: Final = 12
_MOST_STEPS: Final = 4000
_MOST_MARKS: Final = 1000
_PARENT_GONE: Final = -2  # there was a hop before, and it was merged with others or lost


def lanes(
    profile: Profile,
    clock: Clock,
    names: Names,
    arrays: Arrays,
    *,
    most: int,
    exact: Sequence[tuple[int, int]] = (),
) -> dict[str, Any]:
    """All lanes of a run, about `most` spans of compute and of transfers each, a third as many waits."""
    return {
        "steps": _steps(profile, clock, arrays, exact),
        "marks": _marks(profile, clock, names, arrays),
        "compute": _compute(profile, clock, names, arrays, most, exact),
        "transfers": _transfers(profile, clock, names, arrays, most, exact),
        "waits": _waits(profile, clock, names, arrays, most // 3, exact),
    }


def _spans(merged: Merged, arrays: Arrays, clock: Clock, shown: int) -> dict[str, Any]:
    return {
        "start": arrays.add(merged.start, delta=True),
        "length": arrays.add(merged.end - merged.start),
        "count": arrays.add(merged.count),
        "fill": arrays.add(merged.fill),
        "shown": shown,
        "merged_ns": merged.width * clock.tick_ns,
        "exact": [list(stretch) for stretch in merged.exact],
    }


def _steps(profile: Profile, clock: Clock, arrays: Arrays, exact: Sequence[tuple[int, int]]) -> dict[str, Any]:
    found = profile[Step]
    found = found.where(found.end >= found.start)
    start, end = clock.spans(found.start, found.end)
    merged = merge(start, end, np.zeros(len(found), dtype=np.int64), weight=end - start, most=_MOST_STEPS, exact=exact)
    picked = found.where(merged.pick)
    numbers, place = np.unique(picked.phase, return_inverse=True)
    return {
        **_spans(merged, arrays, clock, len(found)),
        "id": arrays.add(picked.id),
        "tokens": arrays.add(picked.tokens),
        "phase": arrays.add(place.reshape(-1)),
        "phases": [profile.string(int(number)) for number in numbers],
    }


def _marks(profile: Profile, clock: Clock, names: Names, arrays: Arrays) -> dict[str, Any]:
    found = profile[Mark]
    at = clock.at(found.at)
    merged = merge(at, at, found.kind, weight=at * 0, most=_MOST_MARKS)
    picked = found.where(merged.pick)
    block = names.block(picked.block)
    module = names.module(picked.module)
    return {
        **_spans(merged, arrays, clock, len(found)),
        "kind": arrays.add(picked.kind),
        "block": arrays.add(block),
        "module": arrays.add(np.where(module >= 0, module, names.owner(block))),
        "text": [profile.string(int(number)) for number in picked.text],
    }


def _compute(
    profile: Profile, clock: Clock, names: Names, arrays: Arrays, most: int, exact: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    found = profile[Compute]
    total = len(found)
    lanes_ns: dict[int, int] = {}
    if total:
        numbers, place = np.unique(found.lane, return_inverse=True)
        busy = np.bincount(place.reshape(-1), weights=np.maximum(found.end - found.start, 0))
        lanes_ns = {int(n): int(b) for n, b in zip(numbers, busy, strict=True)}
    kept = sorted(sorted(lanes_ns, key=lambda lane: -lanes_ns[lane])[:_MOST_LANES])
    depth = np.clip(found.depth, 0, None)
    lane = ranks(np.array(kept, dtype=np.int64), found.lane)
    mask = (lane >= 0) & (depth < _MOST_DEPTH)
    found, depth, lane = found.where(mask), depth[mask], lane[mask]
    start, end = clock.spans(found.start, found.end)
    row = lane * _MOST_DEPTH + depth
    merged = merge(start, end, row, weight=end - start, most=most, exact=exact)
    rows, place = np.unique(row[merged.pick], return_inverse=True)
    return {
        **_spans(merged, arrays, clock, len(found)),
        "row": arrays.add(place.reshape(-1)),
        "module": arrays.add(names.module(found.module)[merged.pick]),
        "phase": arrays.add(found.phase[merged.pick]),
        "rows": [[kept[int(r) // _MOST_DEPTH], int(r) % _MOST_DEPTH] for r in rows],
        "hidden": total - len(found),
    }


def _transfers(
    profile: Profile, clock: Clock, names: Names, arrays: Arrays, most: int, exact: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    found = profile[Transfer]
    start, end = clock.spans(found.start, found.end)
    key = found.link * len(Cause) + found.cause
    merged = merge(start, end, key, weight=found.nbytes, most=most, exact=exact)
    picked = found.where(merged.pick)
    row = np.zeros(len(picked), dtype=np.int64)
    links = []
    for link in _SHOWN:
        mine = np.flatnonzero(picked.link == link)
        if len(mine):
            row[mine], rows = pack(merged.start[mine], merged.end[mine], most=_MOST_ROWS)
            links.append({"link": link.name, "number": int(link), "rows": rows})
    block = names.block(picked.block)
    return {
        **_spans(merged, arrays, clock, len(found)),
        "row": arrays.add(row),
        "link": arrays.add(picked.link),
        "cause": arrays.add(picked.cause),
        "failed": arrays.add(picked.failed > 0),
        "block": arrays.add(block),
        "module": arrays.add(names.owner(block)),
        "nbytes": arrays.add(merged.total),
        "queued": arrays.add(np.maximum(0, (picked.start - picked.issued) // clock.tick_ns)),
        "parent": arrays.add(_parents(picked.id, picked.parent, merged.count)),
        "links": links,
    }


def _parents(numbers: Column, parents: Column, count: Column) -> Column:
    # Only spans that stand for one transfer can be part of a chain.
    single = np.flatnonzero(count == 1)
    known, first = np.unique(numbers[single], return_index=True)
    place = ranks(known, parents)
    above = single[first][place] if len(known) else np.zeros(len(parents), dtype=np.int64)
    return np.where(parents < 0, -1, np.where((place >= 0) & (count == 1), above, _PARENT_GONE))


def _waits(
    profile: Profile, clock: Clock, names: Names, arrays: Arrays, most: int, exact: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    found = profile[Wait]
    start, end = clock.spans(found.needed, found.ready)
    merged = merge(start, end, np.zeros(len(found), dtype=np.int64), weight=end - start, most=most, exact=exact)
    picked = found.where(merged.pick)
    block = names.block(picked.block)
    module = names.module(picked.module)
    return {
        **_spans(merged, arrays, clock, len(found)),
        "block": arrays.add(block),
        "module": arrays.add(np.where(module >= 0, module, names.owner(block))),
        "waited": arrays.add(merged.total),
    }
