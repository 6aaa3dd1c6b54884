"""Who held how much of a tier, and when it held most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from .intervals import Ints
from .profile import Columns, Profile
from .schema import Category, Gauge, Memory, Meter, Tier
from .summary import MemoryRow, TierPeak
from .window import Window

By = Literal["category", "module"]

METERS: Final[dict[Tier, tuple[Meter, ...]]] = {
    Tier.HOST: (Meter.HOST_RSS, Meter.HOST_ANONYMOUS),
    Tier.DEVICE: (Meter.DEVICE_USED, Meter.DEVICE_RESERVED, Meter.DEVICE_ALLOCATED),
}
"""What the system says of a tier: the first of these that was read."""
PLATEAU: Final = 0.02
"""Readings this close to the highest are the peak too: of them the one counts at which the records know most. An
allocator keeps what a program gives back, so that readings stay high after the instant that made them so. Readings of
which is known how much of them was kept go first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """Live bytes over time. Between two instants the values of the earlier one hold."""

    at: Ints
    """Ascending, nanoseconds of the monotonic clock."""
    names: tuple[str, ...]
    """Names of categories in their order, or paths of modules, the largest first."""
    nbytes: Ints
    """By name and instant: shape [len(names), len(at)]."""


def records_of(profile: Profile, tier: Tier) -> Columns:
    """The memory records of a tier in the order of time; those of one instant as they were written."""
    memory = profile[Memory]
    memory = memory.where(memory.tier == tier)
    return memory.where(np.argsort(memory.at, kind="stable"))


def readings(profile: Profile, meter: Meter) -> Columns:
    """The readings of a meter in the order of time."""
    gauges = profile[Gauge]
    gauges = gauges.where(gauges.meter == meter)
    return gauges.where(np.argsort(gauges.at, kind="stable"))


def system(profile: Profile, tier: Tier) -> Columns | None:
    """What the system said is held of a tier, in the order of time; None where nothing was read."""
    for meter in METERS.get(tier, ()):
        found = readings(profile, meter)
        if len(found):
            return found
    return None


def in_use(profile: Profile, tier: Tier, gauges: Columns) -> tuple[Ints, Ints]:
    """Instants of these readings of `system` of which is known what the allocator kept, and the bytes in use then."""
    kept = _kept(profile, tier, gauges, gauges.at)
    told = kept >= 0
    return gauges.at[told], gauges.value[told] - kept[told]


def live(memory: Columns) -> tuple[Ints, Ints]:
    """Instants, each once, and the bytes that were live from then on, of records in the order of time."""
    total = np.cumsum(memory.nbytes)
    last = np.append(memory.at[1:] != memory.at[:-1], True) if len(memory) else np.zeros(0, dtype=bool)
    return memory.at[last], total[last]


def live_at(at: Ints, levels: Ints, points: Ints) -> Ints:
    """The level at each of these instants; 0 before the first."""
    return np.concatenate(([0], levels))[np.searchsorted(at, points, side="right")]


def series(profile: Profile, tier: Tier, *, by: By = "category", points: int = 2000) -> Series:
    """Live bytes of a tier by category or module, at no more than `points` instants.

    Where there are more, each stretch of time is shown by the instant of it at which most was live, so that no peak
    is lost; the last instant is always there.
    """
    memory = records_of(profile, tier)
    keys = memory.category if by == "category" else memory.module
    names = _names(profile, by, keys)
    at = _thinned(*live(memory), points)
    numbers = np.array(list(names), dtype=np.int64)
    known = np.isin(keys, numbers)
    order = np.argsort(numbers)
    row = order[np.searchsorted(numbers[order], keys[known])]
    column = np.searchsorted(at, memory.at[known], side="left")
    nbytes = np.zeros((len(numbers), len(at)), dtype=np.int64)
    np.add.at(nbytes, (row, column), memory.nbytes[known])
    np.cumsum(nbytes, axis=1, out=nbytes)
    kept = np.arange(len(numbers))
    if by == "module" and len(at):
        kept = np.argsort(-nbytes.max(axis=1), kind="stable")
    labels = list(names.values())
    return Series(at=at, names=tuple(labels[row] for row in kept.tolist()), nbytes=nbytes[kept])


def peaks(profile: Profile, window: Window) -> tuple[TierPeak, ...]:
    """The tiers of which anything is known, each at the instant of the window at which it held most."""
    found = (_peak(profile, tier, window) for tier in Tier)
    return tuple(peak for peak in found if peak is not None)


def _peak(profile: Profile, tier: Tier, window: Window) -> TierPeak | None:
    memory = records_of(profile, tier)
    at, levels = live(memory)
    gauges = system(profile, tier)
    if gauges is None and not len(memory):
        return None
    if gauges is not None:
        instants, values = _in_window(gauges.at, gauges.value, window)
        high = np.flatnonzero(values >= (1 - PLATEAU) * values.max())
        told = high[_kept(profile, tier, gauges, instants[high]) >= 0]
        high = told if len(told) else high
        row = int(high[np.lexsort((values[high], live_at(at, levels, instants[high])))[-1]])
    else:
        instants, values = _in_window(at, levels, window)
        row = int(np.argmax(values))
    instant, nbytes = int(instants[row]), int(values.max())
    before = memory.where(memory.at <= instant)
    categories = _rows(profile, "category", before)
    kept = -1 if gauges is None else int(_kept(profile, tier, gauges, np.array([instant]))[0])
    used = nbytes - max(kept, 0)
    unaccounted = used - sum(held.nbytes for held in categories)
    vague = abs(unaccounted) + sum(held.nbytes for held in categories if held.name == Category.LIBRARY.name)
    return TierPeak(
        tier=tier.name,
        at_ns=instant,
        nbytes=nbytes,
        categories=categories,
        modules=_rows(profile, "module", before),
        unaccounted_nbytes=unaccounted,
        named=max(0.0, 1 - vague / used) if used > 0 else float(not vague),
        capacity_nbytes=profile.header.capacities.get(tier.name),
        budget_nbytes=profile.header.budgets.get(tier.name),
        fragmentation_nbytes=None if kept < 0 else kept,
    )


def _in_window(at: Ints, values: Ints, window: Window) -> tuple[Ints, Ints]:
    """The instants inside the window, and its start with what held then; the first there is, where none is so early."""
    inside = window.holds(at)
    earlier = int(np.searchsorted(at, window.start, side="right")) - 1
    if earlier >= 0 and at[earlier] < window.start:
        return (
            np.concatenate(([window.start], at[inside])),
            np.concatenate(([values[earlier]], values[inside])),
        )
    return (at[inside], values[inside]) if inside.any() else (at[:1], values[:1])


def _rows(profile: Profile, by: By, memory: Columns) -> tuple[MemoryRow, ...]:
    """What is live after these records, largest first. What falls below zero (lost records) is no row."""
    keys = memory.category if by == "category" else memory.module
    names = _names(profile, by, keys)
    numbers, row = np.unique(keys, return_inverse=True)
    sums = np.zeros(len(numbers), dtype=np.int64)
    np.add.at(sums, row, memory.nbytes)
    rows = [
        MemoryRow(name=names[number], nbytes=nbytes)
        for number, nbytes in zip(numbers.tolist(), sums.tolist(), strict=True)
        if nbytes > 0 and number in names
    ]
    return tuple(sorted(rows, key=lambda held: -held.nbytes))


def _names(profile: Profile, by: By, keys: Ints) -> dict[int, str]:
    """Names of the categories or modules that occur, by number; bytes of no known module have none."""
    known = {category.value: category.name for category in Category}
    name: Callable[[int], str] = profile.module_path if by == "module" else lambda number: known.get(number, "")
    found = {number: name(number) for number in np.unique(keys).tolist()}
    return {number: label for number, label in found.items() if label}


def _thinned(at: Ints, levels: Ints, points: int) -> Ints:
    """At most `points` of these instants: of each stretch of time the highest, and the last of all."""
    if len(at) <= points:
        return at
    bins = max(points - 1, 1)
    stretch = (at - at[0]) // ((at[-1] - at[0]) // bins + 1)
    order = np.lexsort((levels, stretch))
    highest = order[np.append(stretch[order][1:] != stretch[order][:-1], True)]
    return np.union1d(at[highest], at[-1:])


def _kept(profile: Profile, tier: Tier, gauges: Columns, instants: Ints) -> Ints:
    """What the allocator kept and had not given out at these instants of `gauges`; -1 where it was not read."""
    if tier is Tier.HOST:
        freed = readings(profile, Meter.HOST_FREED)
        row = np.searchsorted(gauges.at, instants, side="right") - 1
        following = np.append(gauges.at[1:], np.iinfo(np.int64).max)[row]
        return _values(freed, np.searchsorted(freed.at, gauges.at[row], side="left"), before=following)
    reserved, allocated = (
        _values(meter, np.searchsorted(meter.at, instants, side="right") - 1)
        for meter in (readings(profile, Meter.DEVICE_RESERVED), readings(profile, Meter.DEVICE_ALLOCATED))
    )
    return np.where((reserved < 0) | (allocated < 0), -1, reserved - allocated)


def _values(gauges: Columns, rows: Ints, *, before: Ints | None = None) -> Ints:
    """The values in these rows; -1 where there is no such row, or not `before` these instants."""
    there = (rows >= 0) & (rows < len(gauges))
    if not there.any():
        return np.full(len(rows), -1)
    at, values = gauges.at[np.where(there, rows, 0)], gauges.value[np.where(there, rows, 0)]
    return np.where(there if before is None else there & (at < before), values, -1)
