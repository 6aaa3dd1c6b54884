"""Memory that grows from step to step, and storages that nobody gave back.

A cache of keys and values grows with every token and is meant to: its bytes are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from .intervals import Ints
from .occupancy import in_use, live, live_at, records_of, system
from .profile import Columns, Profile
from .schema import MKL, NONE, Category, Memory, Tier
from .summary import Leak, MemoryRow
from .window import Window

_POINTS: Final = 400
"""Pairs of steps are compared: of more steps than this, evenly chosen ones."""
_Z: Final = 1.645
"""One-sided 95 %: a slope counts where even the lower end of its interval is above 0."""
_LEAST_STEPS: Final = 4
"""With fewer steps no slope can be told from chance at that level."""
_LEAST_READINGS: Final = 8
_LEAST_GROWTH_NBYTES: Final = 4 << 20
_LEAST_GROWTH: Final = 0.01
"""Resident memory wanders by itself: allocators keep pages. Less growth than this, and this share, is no leak."""


@dataclass(frozen=True, kw_only=True)
class Slope:
    """A straight line through points most of which may be wrong by anything (Theil, 1950; Sen, 1968)."""

    median: float
    low: float
    """The lower end of the one-sided interval; -inf where there are too few points for one."""

    @staticmethod
    def of(x: Ints, y: Ints) -> Slope:
        """The slope of y over x, which ascends. Takes memory of the square of their length."""
        first, second = np.triu_indices(len(x), k=1)
        slopes = np.sort((y[second] - y[first]) / (x[second] - x[first]))
        if not len(slopes):
            return Slope(median=0.0, low=-math.inf)
        n = len(x)
        spread = _Z * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
        row = math.floor((len(slopes) - spread) / 2)
        return Slope(median=float(np.median(slopes)), low=float(slopes[row]) if row >= 0 else -math.inf)


def leaks(profile: Profile, window: Window) -> tuple[Leak, ...]:
    """The tiers of memory whose live bytes grow over the steps of the window, a tenth of them left out as warm-up.

    What the records know is exact, so that any growth that is not chance counts and the module is named. What only the
    system's meters see, less what the records know, counts where it is more than such meters wander.
    """
    steps = window.steps(profile)
    ends = np.sort(steps.end)[len(steps) // 10 :]
    if len(ends) < _LEAST_STEPS:
        return ()
    rows: Ints = np.unique(np.linspace(0, len(ends) - 1, min(len(ends), _POINTS)).astype(np.int64))
    found = []
    for tier in (Tier.DEVICE, Tier.HOST):
        leak = _recorded(profile, tier, rows, ends) or _unrecorded(profile, tier, rows, ends)
        if leak is not None:
            found.append(leak)
    return tuple(found)


def unfreed(profile: Profile, window: Window) -> tuple[MemoryRow, ...]:
    """Storages taken inside the window, before its last step, and never given back: by name, largest first."""
    steps = window.steps(profile)
    if not len(steps):
        return ()
    memory = profile[Memory]
    memory = memory.where((memory.storage != NONE) & (memory.category != Category.KV) & (memory.tier != Tier.DISK))
    numbers, row = np.unique(memory.storage, return_inverse=True)
    left = np.zeros(len(numbers), dtype=np.int64)
    np.add.at(left, row, memory.nbytes)
    taken = np.full(len(numbers), np.iinfo(np.int64).max)
    np.minimum.at(taken, row, memory.at)
    kept = (left > 0) & (taken >= steps.start[0]) & (taken < steps.start[-1])
    order = np.argsort(-left[kept], kind="stable")
    return tuple(
        MemoryRow(name=_storage_name(profile, number), nbytes=nbytes)
        for number, nbytes in zip(numbers[kept][order].tolist(), left[kept][order].tolist(), strict=True)
    )


def _storage_name(profile: Profile, number: int) -> str:
    storage = profile.storages.get(number)
    return storage.names[0] if storage is not None and storage.names else f"storage {number}"


def _recorded(profile: Profile, tier: Tier, rows: Ints, ends: Ints) -> Leak | None:
    memory = records_of(profile, tier)
    # What of MKL's buffers is resident is worked out from the meters: it wanders as they do.
    estimated = [number for number, module in profile.modules.items() if module.path == MKL]
    memory = memory.where((memory.category != Category.KV) & ~np.isin(memory.module, estimated))
    slope = Slope.of(rows, live_at(*live(memory), ends[rows]))
    if slope.low <= 0:
        return None
    module = _growing_module(profile, memory, rows, ends)
    return Leak(tier=tier.name, nbytes_per_step=slope.median, steps=len(ends), module=module)


def _unrecorded(profile: Profile, tier: Tier, rows: Ints, ends: Ints) -> Leak | None:
    gauges = system(profile, tier)
    if gauges is None or len(gauges) < _LEAST_READINGS or len(ends) < _LEAST_READINGS:
        return None
    readings = live_at(gauges.at, gauges.value, ends[rows])
    seen = readings > 0  # steps before the first reading have none
    rows, readings = rows[seen], readings[seen]
    if len(rows) < _LEAST_READINGS:
        return None
    slope = Slope.of(rows, readings - live_at(*live(records_of(profile, tier)), ends[rows]))
    growth = slope.median * (int(rows[-1]) - int(rows[0]))
    least = max(_LEAST_GROWTH_NBYTES, _LEAST_GROWTH * float(np.median(readings)))
    if slope.low <= 0 or growth < least or _is_kept(profile, tier, gauges, ends, least):
        return None
    return Leak(tier=tier.name, nbytes_per_step=slope.median, steps=len(ends))


def _is_kept(profile: Profile, tier: Tier, gauges: Columns, ends: Ints, least: float) -> bool:
    """Whether it is the allocator that keeps more and more, as it does until a heap is as full of holes as it gets.

    That is so where the readings of which is known how much was kept are enough, and what they have in use grows less
    than `least` in as many steps. A leak grows by its bytes whether a step is looked at or not.
    """
    at, used = in_use(profile, tier, gauges)
    inside = (at > ends[0]) & (at <= ends[-1])
    at, used = at[inside], used[inside]
    if len(at) < _LEAST_READINGS:
        return False
    rows: Ints = np.unique(np.linspace(0, len(at) - 1, min(len(at), _POINTS)).astype(np.int64))
    steps = np.searchsorted(ends, at[rows])
    unknown = used[rows] - live_at(*live(records_of(profile, tier)), at[rows])
    first, second = np.triu_indices(len(rows), k=1)
    apart = steps[second] > steps[first]
    if not apart.any():
        return False
    slopes = (unknown[second] - unknown[first])[apart] / (steps[second] - steps[first])[apart]
    return float(np.median(slopes)) * len(ends) < least


def _growing_module(profile: Profile, memory: Columns, rows: Ints, ends: Ints) -> str:
    """The path of the module whose live bytes grow most; "" where none does."""
    memory = memory.where(memory.at <= ends[rows[-1]])
    modules, row = np.unique(memory.module, return_inverse=True)
    held = np.zeros((len(modules), len(rows)), dtype=np.int64)
    np.add.at(held, (row, np.searchsorted(ends[rows], memory.at, side="left")), memory.nbytes)
    np.cumsum(held, axis=1, out=held)
    # Pairs half the window apart (Theil's incomplete method): all pairs of all modules would be too many.
    half = len(rows) // 2
    slopes: npt.NDArray[np.float64] = np.median(held[:, half:] - held[:, : len(rows) - half], axis=1)
    best = int(np.argmax(slopes))
    return profile.module_path(int(modules[best])) if slopes[best] > 0 else ""
