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
    released = _released(profile, clock, names)
    parts = [_stays(profile, clock, names, tier, released) for tier in (Tier.HOST, Tier.DEVICE)]
    block, start, end, tier = (np.concatenate(column) for column in zip(*parts, strict=True))
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


def _released(profile: Profile, clock: Clock, names: Names) -> tuple[Column, Column]:
    """Blocks (page numbers) and when each of their uses was over (ticks), sorted by both."""
    uses, spans = profile[Use], profile[Compute]
    block = names.block(uses.block)
    over = clock.at(np.maximum(uses.at, uses.ready))
    if len(spans) and len(uses):
        # Place of each use among the compute spans of its module, by one search over (module, start) as one number.
        start, end = clock.spans(spans.start, spans.end)
        order = np.lexsort((start, spans.module))
        modules, place = np.unique(spans.module, return_inverse=True)
        stride = clock.ticks + 1
        keys = (place.reshape(-1) * stride + start)[order]
        module = ranks(modules, uses.module)
        after = np.minimum(np.searchsorted(keys, module * stride + over, side="left"), len(keys) - 1)
        same = (module >= 0) & (spans.module[order][after] == uses.module)
        over = np.where(same, np.maximum(over, end[order][after]), over)
    known = block >= 0
    block, over = block[known], over[known]
    again = np.lexsort((over, block))
    return block[again], over[again]


def _stays(
    profile: Profile, clock: Clock, names: Names, tier: Tier, released: tuple[Column, Column]
) -> tuple[Column, Column, Column, Column]:
    """Blocks (page numbers) that came to a tier, from when to when (ticks) they were there, and the tier."""
    found = profile[Transfer]
    began, ended = clock.spans(found.start, found.end)
    stride = clock.ticks + 1
    block = names.block(found.block)
    good = (block >= 0) & (found.failed == 0)
    came = good & (found.link == _INTO[tier])
    rows = np.flatnonzero(came)
    rows = rows[np.lexsort((ended[rows], block[rows]))]
    who, start = block[rows], ended[rows]
    limit = np.full(len(rows), clock.ticks, dtype=np.int64)
    limit[:-1] = np.where(who[1:] == who[:-1], np.maximum(began[rows][1:], start[:-1]), clock.ticks)
    until = _last_before(who, start, limit, *released, stride)
    end = np.where(until >= 0, until, limit)
    gone = good & (found.link == _OUT_OF[tier]) & (found.cause == Cause.EVICT)
    if tier == Tier.HOST:
        onward = good & (found.link == Link.H2D)
        passed = _last_before(who, start, limit, *_sorted(block[onward], ended[onward]), stride)
        end = np.where(passed >= 0, passed, end)  # a host slot is refilled when its copy is done
    taken = _last_before(who, start, limit, *_sorted(block[gone], ended[gone]), stride)
    end = np.where(taken >= 0, taken, end)
    return who, start, end, np.full(len(rows), int(tier), dtype=np.int64)


def _sorted(block: Column, at: Column) -> tuple[Column, Column]:
    order = np.lexsort((at, block))
    return block[order], at[order]


def _last_before(who: Column, start: Column, limit: Column, block: Column, at: Column, stride: int) -> Column:
    """For each stay the last of its block's instants in [start, limit]; -1 where there is none.

    `block` and `at` are sorted; one search over (block, instant) as one number finds all. Instants are below `stride`.
    """
    if not len(who) or not len(block):
        return np.full(len(who), -1, dtype=np.int64)
    place = np.searchsorted(block * stride + at, who * stride + limit, side="right") - 1
    found = np.maximum(place, 0)
    good = (place >= 0) & (block[found] == who) & (at[found] >= start)
    return np.where(good, at[found], -1)
