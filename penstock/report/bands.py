"""What each tier held over time, by category, with what the meters said."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..runtime.profiler.profile import Column, Columns, Profile
from ..runtime.profiler.schema import Category, Gauge, Memory, Meter, Tier
from .arrays import Arrays
from .clock import Clock

_METERS: Final = {
    Tier.DEVICE: (Meter.DEVICE_ALLOCATED, Meter.DEVICE_RESERVED, Meter.DEVICE_USED),
    Tier.HOST: (Meter.HOST_RSS, Meter.HOST_ANONYMOUS, Meter.HOST_CGROUP),
    Tier.DISK: (),
}


def bands(profile: Profile, clock: Clock, arrays: Arrays, *, most: int) -> list[dict[str, Any]]:
    """One panel per tier; about `most` instants each, which keep every local extreme of what was held."""
    return [_panel(profile, clock, arrays, tier, most) for tier in Tier]


def _panel(profile: Profile, clock: Clock, arrays: Arrays, tier: Tier, most: int) -> dict[str, Any]:
    found = profile[Memory]
    found = found.where(found.tier == tier)
    header = profile.header
    return {
        "tier": tier.name,
        "stack": _stack(found, clock, arrays, most) if len(found) else None,
        "records": len(found),
        "meters": [line for meter in _METERS[tier] if (line := _meter(profile, clock, arrays, meter, most))],
        "capacity": header.capacities.get(tier.name),
        "budget": header.budgets.get(tier.name),
        "home": sum(block.nbytes for block in profile.blocks.values() if block.home == tier),
    }


def _stack(found: Columns, clock: Clock, arrays: Arrays, most: int) -> dict[str, Any]:
    order = np.argsort(found.at, kind="stable")
    at, nbytes, category = clock.at(found.at[order]), found.nbytes[order], found.category[order]
    total = np.cumsum(nbytes)
    kept = telling(at, total, clock.ticks, most)
    present = [c for c in Category if (category == c).any()]
    levels = []
    for one in present:
        rows = np.flatnonzero(category == one)
        level = np.concatenate(([0], np.cumsum(nbytes[rows])))
        levels.append(np.maximum(0, level[np.searchsorted(rows, kept, side="right")]))
    return {
        "at": arrays.add(at[kept], delta=True),
        "categories": [[c.name, arrays.add(v.astype(np.float64))] for c, v in zip(present, levels, strict=True)],
        "peak": float(np.sum(levels, axis=0).max()),
        "thinned": len(at) - len(kept),
    }


def _meter(profile: Profile, clock: Clock, arrays: Arrays, meter: Meter, most: int) -> dict[str, Any] | None:
    found = profile[Gauge]
    found = found.where(found.meter == meter)
    if not len(found):
        return None
    order = np.argsort(found.at, kind="stable")
    at, value = clock.at(found.at[order]), found.value[order]
    kept = telling(at, value, clock.ticks, most)
    return {
        "meter": meter.name,
        "at": arrays.add(at[kept], delta=True),
        "value": arrays.add(value[kept].astype(np.float64)),
        "peak": int(value.max()),
    }


def telling(at: Column, value: Column, ticks: int, most: int) -> npt.NDArray[np.int64]:
    """Rows (in time order) that draw the same picture: of every bin its first, lowest, highest and last value."""
    if len(at) <= most:
        return np.arange(len(at))
    bins = at * max(1, most // 4) // (ticks + 1)
    first = np.concatenate(([0], 1 + np.flatnonzero(bins[1:] != bins[:-1])))
    group = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(at))))
    order = np.lexsort((value, group))
    last = np.append(first[1:], len(at)) - 1
    return np.unique(np.concatenate((first, order[first], order[last], last)))
