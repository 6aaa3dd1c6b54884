"""Who held memory, and when most of it was held."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from profiles import MIB, header, profile_of, streamed
from randomprofiles import LAST, profiles, windows

from penstock.runtime.profiler.metrics import summarise
from penstock.runtime.profiler.occupancy import By, peaks, series
from penstock.runtime.profiler.profile import Profile
from penstock.runtime.profiler.schema import Category, Gauge, Memory, Meter, Record, Step, Tier
from penstock.runtime.profiler.summary import MemoryRow, TierPeak
from penstock.runtime.profiler.window import Window


def memory(
    at: int, nbytes: int, category: Category = Category.WEIGHT, *, module: int = -1, tier: Tier = Tier.HOST
) -> Memory:
    return Memory(at=at, tier=tier, category=category, nbytes=nbytes, module=module)


def peak_of(records: list[Record], *, tier: str = "HOST", window: tuple[int, int] | None = None) -> TierPeak:
    return next(peak for peak in summarise(profile_of(records), window=window).peaks if peak.tier == tier)


def test_a_streamed_run_holds_the_baseline_and_an_arena() -> None:
    (peak,) = summarise(streamed()).peaks
    assert (peak.tier, peak.nbytes, peak.unaccounted_nbytes, peak.named) == ("HOST", 220 * MIB, 0, 1.0)
    assert peak.categories == (
        MemoryRow(name="BASELINE", nbytes=200 * MIB),
        MemoryRow(name="ARENA", nbytes=20 * MIB),
    )
    assert peak.modules == ()
    assert (peak.capacity_nbytes, peak.budget_nbytes, peak.fragmentation_nbytes) == (1024 * MIB, 512 * MIB, None)


def test_the_peak_is_where_the_system_says_and_both_sides_are_of_that_instant() -> None:
    records: list[Record] = [
        memory(0, 100, Category.BASELINE),
        memory(5, 60, module=1),
        memory(6, 30, Category.GRADIENT, module=1),
        memory(7, 10, module=2),
        memory(20, -60, module=1),
        memory(20, 500, Category.KV),  # taken, and no page of it touched yet
        Gauge(at=4, meter=Meter.HOST_RSS, value=110),
        Gauge(at=10, meter=Meter.HOST_RSS, value=250),
        Gauge(at=30, meter=Meter.HOST_RSS, value=180),
        Gauge(at=30, meter=Meter.HOST_ANONYMOUS, value=999),  # RSS was read: this is not what is shown
    ]
    peak = peak_of(records)
    assert (peak.at_ns, peak.nbytes) == (10, 250)
    assert [(row.name, row.nbytes) for row in peak.categories] == [("BASELINE", 100), ("WEIGHT", 70), ("GRADIENT", 30)]
    assert [(row.name, row.nbytes) for row in peak.modules] == [("layers.0", 90), ("layers.1", 10)]
    assert peak.unaccounted_nbytes == 50
    assert peak.named == pytest.approx(0.8)
    later = peak_of(records, window=(15, 40))
    assert (later.at_ns, later.nbytes) == (15, 250)  # the last reading before the window holds when it begins
    assert peak_of(records, window=(30, 40)).unaccounted_nbytes == 180 - 640


def test_without_a_gauge_the_records_say_what_is_held() -> None:
    peak = peak_of([memory(0, 10), memory(3, 20), memory(9, -25)])
    assert (peak.at_ns, peak.nbytes, peak.unaccounted_nbytes, peak.named) == (3, 30, 0, 1.0)


def test_of_equal_readings_the_one_at_which_most_is_known_is_taken() -> None:
    gauges = [Gauge(at=at, meter=Meter.HOST_RSS, value=100) for at in (0, 10, 20)]
    assert peak_of([*gauges, memory(5, 90), memory(15, -90)]).at_ns == 10


def test_bytes_below_zero_are_no_row() -> None:
    # The record that took them was lost.
    peak = peak_of([memory(0, 10), memory(0, -5, Category.GRADIENT), Gauge(at=1, meter=Meter.HOST_RSS, value=10)])
    assert [row.name for row in peak.categories] == ["WEIGHT"]
    assert peak.unaccounted_nbytes == 0


def test_fragmentation_is_what_the_allocator_reserved_and_did_not_give_out() -> None:
    records: list[Record] = [
        Gauge(at=1, meter=Meter.DEVICE_RESERVED, value=80),
        Gauge(at=1, meter=Meter.DEVICE_ALLOCATED, value=50),
        Gauge(at=2, meter=Meter.DEVICE_USED, value=200),
        Gauge(at=3, meter=Meter.DEVICE_RESERVED, value=90),
    ]
    peak = peak_of(records, tier="DEVICE")
    assert (peak.nbytes, peak.fragmentation_nbytes, peak.capacity_nbytes) == (200, 30, None)
    assert peak.unaccounted_nbytes == 170


def test_what_the_heap_keeps_is_in_nobodys_use() -> None:
    records: list[Record] = [
        memory(0, 100, Category.BASELINE),
        memory(0, 50, Category.LIBRARY),
        Gauge(at=10, meter=Meter.HOST_RSS, value=200),
        Gauge(at=11, meter=Meter.HOST_FREED, value=40),
    ]
    peak = peak_of(records)
    assert (peak.nbytes, peak.fragmentation_nbytes, peak.unaccounted_nbytes) == (200, 40, 10)
    assert peak.named == pytest.approx(100 / 160)  # what imports added has a row, not a name


def test_what_the_heap_kept_at_another_reading_says_nothing_about_the_peak() -> None:
    records: list[Record] = [
        memory(0, 100, Category.BASELINE),
        Gauge(at=10, meter=Meter.HOST_RSS, value=150),
        Gauge(at=11, meter=Meter.HOST_FREED, value=40),
        Gauge(at=20, meter=Meter.HOST_RSS, value=200),
        Gauge(at=30, meter=Meter.HOST_RSS, value=150),
        Gauge(at=31, meter=Meter.HOST_FREED, value=50),
    ]
    peak = peak_of(records)
    assert (peak.fragmentation_nbytes, peak.unaccounted_nbytes, peak.named) == (None, 100, 0.5)


def test_of_readings_near_the_peak_one_of_which_is_known_what_was_kept_is_taken() -> None:
    records: list[Record] = [
        memory(0, 100, Category.BASELINE),
        Gauge(at=10, meter=Meter.HOST_RSS, value=990),
        Gauge(at=11, meter=Meter.HOST_FREED, value=800),
        memory(15, 100),
        Gauge(at=20, meter=Meter.HOST_RSS, value=1000),
    ]
    peak = peak_of(records)
    assert (peak.at_ns, peak.nbytes, peak.fragmentation_nbytes, peak.unaccounted_nbytes) == (10, 1000, 800, 100)


def test_no_more_is_kept_than_there_is() -> None:
    records = [Gauge(at=1, meter=Meter.HOST_RSS, value=100), Gauge(at=2, meter=Meter.HOST_FREED, value=100)]
    assert (peak_of([*records]).unaccounted_nbytes, peak_of([*records]).named) == (0, 1.0)


@given(profiles(), windows)
def test_peaks_agree_with_looking_at_every_instant(profile: Profile, window: tuple[int, int]) -> None:
    profile.columns[Gauge] = profile[Gauge].where(np.zeros(len(profile[Gauge]), dtype=bool))
    chosen = Window.of(profile, window)
    instants = [t for t in range(window[0], window[1] + 1) if t < window[1] or chosen.last]
    assume(instants)
    for peak in peaks(profile, chosen):
        rows = [row for row in profile[Memory].rows() if Tier(row["tier"]).name == peak.tier]
        if min(row["at"] for row in rows) > window[1]:
            continue  # nothing is known of the window: the first instant there is stands for it
        levels = {t: sum(row["nbytes"] for row in rows if row["at"] <= t) for t in instants}
        known = {t: level for t, level in levels.items() if any(row["at"] <= t for row in rows)}
        if known:
            assert peak.nbytes == max(known.values()) == levels[peak.at_ns]
        kept = peak.fragmentation_nbytes or 0
        assert peak.unaccounted_nbytes == peak.nbytes - kept - sum(row.nbytes for row in peak.categories)
        assert 0 <= peak.named <= 1


@given(profiles(), st.sampled_from(Tier), st.sampled_from(["category", "module"]))
def test_a_series_shows_what_is_live_at_every_instant(profile: Profile, tier: Tier, by: By) -> None:
    found = series(profile, tier, by=by)
    rows = [row for row in profile[Memory].rows() if row["tier"] == tier]
    assert found.at.tolist() == sorted({row["at"] for row in rows})
    name = profile.module_path if by == "module" else lambda number: Category(number).name
    for label, levels in zip(found.names, found.nbytes.tolist(), strict=True):
        mine = [row for row in rows if name(row[by]) == label]
        assert levels == [sum(row["nbytes"] for row in mine if row["at"] <= t) for t in found.at.tolist()]
    assert set(found.names) == {name(row[by]) for row in rows} - {""}


@given(profiles(), st.integers(2, 10))
def test_a_series_of_few_points_keeps_the_peak_and_the_end(profile: Profile, points: int) -> None:
    every, few = series(profile, Tier.HOST), series(profile, Tier.HOST, points=points)
    assert len(few.at) <= points
    if len(every.at):
        assert few.nbytes.sum(axis=0).max() == every.nbytes.sum(axis=0).max()
        assert few.nbytes[:, -1].tolist() == every.nbytes[:, -1].tolist()
        assert np.isin(few.at, every.at).all()
        assert few.nbytes.tolist() == every.nbytes[:, np.isin(every.at, few.at)].tolist()


def test_a_run_of_which_nothing_is_known_has_no_peaks_and_an_empty_series() -> None:
    assert summarise(profile_of([Step(id=0, phase=0, start=0, end=LAST)], header=header(budgets={}))).peaks == ()
    found = series(profile_of([]), Tier.HOST)
    assert (found.names, found.nbytes.shape) == ((), (0, 0))
