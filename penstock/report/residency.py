"""Where every block was, over time: what the residency map draws.

Profiles do not say when a clean block was dropped: nothing moves. A block counts as there from the end of the transfer
that brought it until it was taken away, or else until its last use before it was brought again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ..runtime.profiler.profile import Column, Profile
from ..runtime.profiler.schema import Cause, Compute, Link, Tier, Transfer, Use
from .arrays import Arrays
from .clock import Clock, ranks
from .merging import merge
from .names import Names

_NEVER: Final = np.iinfo(np.int64).max
_INTO: Final = {Tier.HOST: Link.DISK_READ, Tier.DEVICE: Link.H2D}
_OUT_OF: Final = {Tier.HOST: Link.DISK_WRITE, Tier.DEVICE: Link.D2H}


def residency(
    profile: Profile,
    clock: Clock,
    names: Names,
    arrays: Arrays,
    *,
    most: int,
    exact: Sequence[tuple[int, int]] = (),
) -> dict[str, Any]:
    """Rows of blocks in the order of their first use, and stays of blocks in tiers above their home."""
    row_of = _rows(profile, names)
    released = _released(profile, names)
    parts = [_stays(profile, names, tier, released) for tier in (Tier.HOST, Tier.DEVICE)]
    block, start_ns, end_ns, tier = (np.concatenate(column) for column in zip(*parts, strict=True))
    start, end = clock.spans(start_ns, end_ns)
    row = row_of[block] if len(block) else block
    merged = merge(start, end, row * len(Tier) + tier, weight=end - start, most=most, exact=exact)
    order = np.argsort(row_of, kind="stable")
    return {
        "start": arrays.add(merged.start, delta=True),
        "length": arrays.add(merged.end - merged.start),
        "row": arrays.add(row[merged.pick]),
        "tier": arrays.add(tier[merged.pick]),
        "count": arrays.add(merged.count),
        "fill": arrays.add(merged.fill),
        "blocks": arrays.add(order),
        "merged_ns": merged.width * clock.tick_ns,
        "stays": len(block),
    }


def _rows(profile: Profile, names: Names) -> Column:
    """By page number of block: its row. Those that were never used nor moved come last."""
    first = np.full(len(names.blocks), _NEVER, dtype=np.int64)
    for numbers, at in (
        (profile[Use].block, profile[Use].at),
        (profile[Transfer].block, profile[Transfer].start),
    ):
        place = names.block(numbers)
        known = place >= 0
        unset = first == _NEVER  # a block that was used is placed by its uses alone
        earliest = np.full(len(first), _NEVER, dtype=np.int64)
        np.minimum.at(earliest, place[known], at[known])
        first = np.where(unset, earliest, first)
    row = np.empty(len(first), dtype=np.int64)
    row[np.argsort(first, kind="stable")] = np.arange(len(first))
    return row


def _released(profile: Profile, names: Names) -> tuple[Column, Column]:
    """Blocks (page numbers) and when each of their uses was over, sorted by both."""
    uses, spans = profile[Use], profile[Compute]
    block = names.block(uses.block)
    over = np.maximum(uses.at, uses.ready)
    order = np.lexsort((spans.start, spans.module))
    # Place of each use among the compute spans of its module, by one search over (module, start) as one number.
    modules = np.unique(spans.module)
    if len(spans) and len(uses):
        base = int(min(spans.start.min(), over.min()))
        stride = int(max(spans.start.max(), over.max())) - base + 2
        keys = np.searchsorted(modules, spans.module[order]) * stride + (spans.start[order] - base)
        module = ranks(modules, uses.module)
        after = np.searchsorted(keys, module * stride + (over - base), side="left")
        after = np.minimum(after, len(keys) - 1)
        same = (module >= 0) & (spans.module[order][after] == uses.module)
        over = np.where(same, np.maximum(over, spans.end[order][after]), over)
    known = block >= 0
    block, over = block[known], over[known]
    again = np.lexsort((over, block))
    return block[again], over[again]


def _stays(
    profile: Profile, names: Names, tier: Tier, released: tuple[Column, Column]
) -> tuple[Column, Column, Column, Column]:
    found = profile[Transfer]
    block = names.block(found.block)
    good = (block >= 0) & (found.failed == 0)
    came = good & (found.link == _INTO[tier])
    rows = np.flatnonzero(came)
    rows = rows[np.lexsort((found.end[rows], block[rows]))]
    who, start = block[rows], found.end[rows]
    last = profile.span()[1]
    limit = np.full(len(rows), last, dtype=np.int64)
    limit[:-1] = np.where(who[1:] == who[:-1], np.maximum(found.start[rows][1:], start[:-1]), last)
    until = _last_before(who, start, limit, *released)
    end = np.where(until >= 0, until, limit)
    gone = good & (found.link == _OUT_OF[tier]) & (found.cause == Cause.EVICT)
    if tier == Tier.HOST:
        onward = good & (found.link == Link.H2D)
        passed = _last_before(who, start, limit, *_sorted(block[onward], found.end[onward]))
        end = np.where(passed >= 0, passed, end)  # a host slot is refilled when its copy is done
    taken = _last_before(who, start, limit, *_sorted(block[gone], found.end[gone]))
    end = np.where(taken >= 0, taken, end)
    return who, start, end, np.full(len(rows), int(tier), dtype=np.int64)


def _sorted(block: Column, at: Column) -> tuple[Column, Column]:
    order = np.lexsort((at, block))
    return block[order], at[order]


def _last_before(who: Column, start: Column, limit: Column, block: Column, at: Column) -> Column:
    """For each stay the last of its block's instants in [start, limit]; -1 where there is none."""
    if not len(who) or not len(block):
        return np.full(len(who), -1, dtype=np.int64)
    base = int(min(start.min(), at.min()))
    stride = int(max(limit.max(), at.max())) - base + 2
    keys = block * stride + (at - base)
    place = np.searchsorted(keys, who * stride + (limit - base), side="right") - 1
    found = np.maximum(place, 0)
    good = (place >= 0) & (block[found] == who) & (at[found] >= start)
    return np.where(good, at[found], -1)
