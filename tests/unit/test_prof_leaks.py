"""Memory that grows, told from memory that wanders."""

from __future__ import annotations

import math
import random
from itertools import combinations
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import MIB, profile_of

from penstock.runtime.profiler.leaks import Slope, unfreed
from penstock.runtime.profiler.metrics import summarise
from penstock.runtime.profiler.profile import Profile
from penstock.runtime.profiler.schema import Category, Gauge, Memory, Meter, Record, Step, Storage, Tier
from penstock.runtime.profiler.window import Window


def run(steps: int, *records: Record) -> Profile:
    """Steps of 10 ns one after another, and these records."""
    return profile_of([*(Step(id=i, phase=0, start=10 * i, end=10 * i + 10) for i in range(steps)), *records])


def memory(
    at: int, nbytes: int, category: Category = Category.ACTIVATION, *, module: int = 1, storage: int = -1
) -> Memory:
    return Memory(at=at, tier=Tier.HOST, category=category, nbytes=nbytes, module=module, storage=storage)


def breathing(steps: int) -> list[Record]:
    """What every step takes and gives back, and states that the first step makes."""
    found: list[Record] = [memory(5, 1000, Category.OPTIMIZER)]
    for step in range(steps):
        found += [memory(10 * step + 1, 500), memory(10 * step + 9, -500)]
    return found


@given(st.lists(st.integers(-100, 100), min_size=2, max_size=12))
def test_the_slope_is_the_median_of_all_slopes(values: list[int]) -> None:
    found = Slope.of(np.arange(len(values)), np.array(values))
    pairs = list(combinations(range(len(values)), 2))
    assert found.median == pytest.approx(median((values[j] - values[i]) / (j - i) for i, j in pairs))
    assert found.low <= found.median


def test_too_few_points_have_no_certain_slope() -> None:
    assert Slope.of(np.arange(3), np.array([1, 2, 3])).low == -math.inf
    assert Slope.of(np.arange(4), np.array([1, 2, 3, 4])).low == 1.0
    assert Slope.of(np.arange(0), np.arange(0)) == Slope(median=0.0, low=-math.inf)


def test_a_run_that_gives_back_what_it_takes_has_no_leaks() -> None:
    assert summarise(run(20, *breathing(20))).leaks == ()


def test_a_module_that_keeps_something_in_every_step_is_named() -> None:
    kept = [memory(10 * step + 5, 64, module=3) for step in range(20)]
    other = [memory(10 * step + 5, 1, module=2) for step in range(20)]
    (leak,) = summarise(run(20, *breathing(20), *kept, *other)).leaks
    assert (leak.tier, leak.nbytes_per_step, leak.module) == ("HOST", 65.0, "layers.2")
    assert leak.steps == 18  # the first step is warm-up, and a tenth of the others


def test_growing_once_is_no_leak_and_neither_is_a_cache_of_keys_and_values() -> None:
    once = [memory(105, 10**9)]
    cache = [memory(10 * step + 5, 64, Category.KV) for step in range(20)]
    assert summarise(run(20, *breathing(20), *once)).leaks == ()
    assert summarise(run(20, *breathing(20), *cache)).leaks == ()


def gauges(levels: list[int]) -> list[Record]:
    return [Gauge(at=10 * step + 10, meter=Meter.HOST_RSS, value=level) for step, level in enumerate(levels)]


def test_what_only_the_system_sees_counts_where_it_is_much() -> None:
    growing = [100 * MIB + step * MIB for step in range(40)]
    (leak,) = summarise(run(40, *breathing(40), *gauges(growing))).leaks
    assert (leak.tier, leak.module) == ("HOST", "")
    assert leak.nbytes_per_step == MIB
    creeping = [100 * MIB + step * 4096 for step in range(40)]  # pages that an allocator keeps
    assert summarise(run(40, *gauges(creeping))).leaks == ()
    rng = random.Random(0)
    wandering = [100 * MIB + rng.randrange(8 * MIB) for _ in range(40)]
    assert summarise(run(40, *gauges(wandering))).leaks == ()


def test_what_the_allocator_keeps_more_and_more_of_is_no_leak() -> None:
    growing = [100 * MIB + step * MIB for step in range(40)]

    def kept(levels: list[int]) -> list[Record]:
        return [Gauge(at=10 * step + 10, meter=Meter.HOST_FREED, value=level) for step, level in enumerate(levels)]

    assert summarise(run(40, *gauges(growing), *kept([step * MIB for step in range(40)]))).leaks == ()
    (leak,) = summarise(run(40, *gauges(growing), *kept([5 * MIB] * 40))).leaks
    assert leak.nbytes_per_step == MIB  # it keeps no more than it did
    half = kept([step * MIB // 2 for step in range(40)])
    assert [leak.tier for leak in summarise(run(40, *gauges(growing), *half)).leaks] == ["HOST"]
    few = [gauge for gauge in kept([step * MIB for step in range(40)]) if gauge.at % 70 == 0]
    assert len(summarise(run(40, *gauges(growing), *few)).leaks) == 1  # too few to tell


def test_what_the_system_sees_of_a_cache_is_no_leak() -> None:
    cache = [memory(10 * step + 5, MIB, Category.KV) for step in range(40)]
    assert summarise(run(40, *cache, *gauges([100 * MIB + step * MIB for step in range(40)]))).leaks == ()


def test_a_long_run_is_thinned_out_and_its_slope_stays_per_step() -> None:
    kept = [memory(10 * step + 5, 64, module=3) for step in range(3000)]
    (leak,) = summarise(run(3000, *kept)).leaks
    assert leak.nbytes_per_step == pytest.approx(64)
    assert (leak.steps, leak.module) == (2700, "layers.2")


def test_storages_that_nobody_gave_back_are_named() -> None:
    table = {
        i: Storage(
            names=(name,) if name else (),
            nbytes=8,
            dtype="float32",
            shape=(2,),
            category=Category.ACTIVATION,
            tier=Tier.HOST,
            module=1,
        )
        for i, name in enumerate(("early", "kept", "freed", "late", "cache", ""))
    }
    profile = run(
        6,
        memory(5, 8, storage=0),
        memory(25, 8, storage=1),
        memory(25, 8, storage=2),
        memory(45, -8, storage=2),
        memory(55, 8, storage=3),  # in the last step: it may yet be given back
        memory(25, 8, Category.KV, storage=4),
        memory(35, 16, storage=5),
    )
    profile.storages = table
    assert [(row.name, row.nbytes) for row in unfreed(profile, Window.of(profile))] == [("storage 5", 16), ("kept", 8)]
    assert unfreed(profile_of([]), Window.of(profile_of([]))) == ()
