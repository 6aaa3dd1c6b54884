"""The figures of a run, worked out on paper or slowly."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from profiles import MIB, footer, header, profile_of, streamed
from randomprofiles import profiles, windows

from penstock.memory.errors import UsageError
from penstock.runtime.profiler.metrics import summarise
from penstock.runtime.profiler.profile import Columns, Profile
from penstock.runtime.profiler.schema import (
    RECORDS,
    Cause,
    Compute,
    Gauge,
    Launches,
    Link,
    Memory,
    Meter,
    Phase,
    Record,
    Step,
    Transfer,
    Use,
    Wait,
    fields_of,
)
from penstock.runtime.profiler.summary import Idle

MS = 1_000_000


def test_a_streamed_run_comes_to_the_figures_worked_out_on_paper() -> None:
    # Layer n is read from 10n to 10n + 10 ms, waited for from 10n + 6 on, and computes for the 6 ms after that. The
    # window is steps 1 to 5: 46 to 246 ms.
    found = summarise(streamed())
    assert found.window_ns == (46 * MS, 246 * MS)
    assert (found.steps, found.step_ns, found.tokens, found.tokens_per_s) == (5, 40 * MS, 5, 25.0)
    assert found.compute_ns == 120 * MS
    assert found.bubble == pytest.approx(0.4)
    assert found.idle == Idle(disk=80 * MS)
    (link,) = found.links
    assert (link.link, link.transfers) == ("DISK_READ", 20)
    assert link.nbytes == 194 * MIB  # 19 layers, and the last 4 of the 10 ms that one more is read in
    assert link.busy_ns == 194 * MS
    assert link.overlap == pytest.approx(114 / 194)
    assert link.exposed_ns == 80 * MS
    assert link.bandwidth == pytest.approx(MIB * 1000)
    assert link.efficiency == pytest.approx(MIB * 1000 / 1e9)
    assert link.amplification == pytest.approx(194 / 40)
    assert found.binds == "DISK_READ"
    assert found.bound_ns == pytest.approx(194 * MIB)  # at 1e9 bytes per second, a nanosecond each
    assert found.distance == pytest.approx(200 * MS / (194 * MIB))


def test_prefetching_and_energy_and_the_recorder_of_the_same_run() -> None:
    profile = streamed()
    joules = [Gauge(at=at * MS, meter=Meter.ENERGY_CPU, value=at * 10_000) for at in (0, 100, 300)]  # 10 W
    profile.columns[Gauge] = Columns.joined(Gauge, (profile[Gauge], Columns.of(Gauge, joules)))
    profile.footer = footer(recorded=99, dropped=1, own_ns=3 * MS)
    found = summarise(profile)
    use = found.prefetch
    assert (use.uses, use.streamed_uses, use.on_time, use.streamed_on_time) == (20, 20, 0.0, 0.0)
    assert use.median_lead_ns == 10 * MS
    assert use.waited_ns == 80 * MS
    assert (use.wasted, use.early_byte_seconds) == (0.0, 0.0)
    assert found.energy.cpu_j == pytest.approx(2.0)
    assert found.energy.device_j is None
    assert found.energy.per_token_j == pytest.approx(2.0 / 5)
    assert found.overhead == pytest.approx(0.01)
    assert (found.recorded, found.dropped) == (99, 1)


def test_a_window_of_ones_own_is_kept() -> None:
    found = summarise(streamed(), window=(46 * MS, 86 * MS))
    assert found.window_ns == (46 * MS, 86 * MS)
    assert (found.steps, found.tokens, found.prefetch.uses) == (1, 1, 4)
    assert found.idle == Idle(disk=16 * MS)
    whole = summarise(streamed(2))  # too few steps to leave one out
    assert whole.window_ns == (0, 86 * MS)
    assert whole.steps == 2


def test_a_window_that_runs_backwards_is_refused() -> None:
    with pytest.raises(UsageError, match="begins at 5 ns and ends at 4 ns"):
        summarise(streamed(), window=(5, 4))


def test_an_empty_run_has_figures_that_say_nothing() -> None:
    found = summarise(profile_of([]))
    assert found.bubble is found.step_ns is found.tokens_per_s is found.bound_ns is found.distance is None
    assert found.overhead is found.tklqt_ns is None
    assert (found.binds, found.verdict) == ("", "nothing was recorded")
    assert not any((found.links, found.peaks, found.leaks, found.modules))
    assert found.prefetch.on_time is found.prefetch.wasted is found.prefetch.median_lead_ns is None


def moved(block: int, start: int, end: int, **changes: int) -> Transfer:
    values = {"id": 0, "nbytes": 100, "issued": start, "failed": 0, **changes}
    return Transfer(block=block, link=Link.DISK_READ, cause=Cause.PREFETCH, start=start, end=end, **values)


def test_being_early_and_in_vain_and_late_is_told_apart() -> None:
    records: list[Record] = [
        moved(0, 0, 10, issued=0),
        Use(block=0, at=30, ready=10, issued=0),  # early by 20 ns
        Use(block=0, at=40, ready=10, issued=0),  # still there: nothing was brought for this use
        moved(1, 10, 20, issued=5),
        moved(1, 50, 60, issued=45),  # brought again: the first time was in vain
        Use(block=1, at=55, ready=60, issued=45),
        Use(block=2, at=58, ready=-1, issued=-1),  # has always been there
        moved(3, 61, 70, failed=1),
        Step(id=0, phase=0, start=0, end=80),
    ]
    use = summarise(profile_of(records)).prefetch
    assert (use.uses, use.streamed_uses) == (4, 2)
    assert use.on_time == pytest.approx(3 / 4)
    assert use.streamed_on_time == pytest.approx(1 / 2)
    assert use.wasted == pytest.approx(1 / 3)
    assert use.median_lead_ns == 20  # of 30 and 10
    assert use.early_byte_seconds == pytest.approx(10 * MIB * 20e-9)


def test_rows_of_tables_are_never_brought_in_vain() -> None:
    rows = Transfer(id=0, block=0, link=Link.DISK_READ, nbytes=5, cause=Cause.ROWS, issued=0, start=0, end=9)
    assert summarise(profile_of([rows])).prefetch.wasted is None


def test_queueing_is_of_the_steps_that_were_traced() -> None:
    steps = [Step(id=n, phase=0, start=100 * n, end=100 * (n + 1)) for n in range(8)]
    traced = Launches(start=200, end=400, steps=2, launches=50, queued=70)
    found = summarise(profile_of([*steps, traced]))
    assert (found.tklqt_ns, found.tklqt_steps, found.tklqt_launches) == (70, 2, 50)
    elsewhere = summarise(profile_of([*steps, traced]), window=(500, 700))
    assert (elsewhere.tklqt_ns, elsewhere.tklqt_steps, elsewhere.tklqt_launches) == (None, 0, 0)


def test_how_far_the_device_runs_behind_is_estimated_where_launches_are_known() -> None:
    spans = [
        Compute(module=1, phase=Phase.FORWARD, start=20, end=30, launched=12),
        Compute(module=2, phase=Phase.FORWARD, start=30, end=40, launched=31),  # clocks agree to microseconds only
        Compute(module=3, phase=Phase.FORWARD, start=40, end=50),
    ]
    found = summarise(profile_of(spans))
    assert found.behind_ns == 4  # the median of 8 and 0
    assert found.tklqt_ns is None
    assert summarise(profile_of(spans[2:])).behind_ns is None


def test_a_link_that_was_not_measured_does_not_enter_the_bound() -> None:
    found = summarise(streamed_with(peaks={}))
    assert (found.binds, found.bound_ns) == ("compute", 120 * MS)
    assert found.links[0].peak is found.links[0].efficiency is None


def streamed_with(**changes: object) -> Profile:
    profile = streamed()
    profile.header = header(**changes)
    return profile


@given(profiles(), windows)
def test_the_figures_of_any_records_agree_with_each_other(profile: Profile, window: tuple[int, int]) -> None:
    found = summarise(profile, window=window)
    length = window[1] - window[0]
    assert found.idle.total == length - found.compute_ns
    waits, spans = list(profile[Wait].rows()), list(profile[Compute].rows())
    busy = {
        t
        for t in range(*window)
        if any(s["start"] <= t < s["end"] for s in spans) and not any(w["needed"] <= t < w["ready"] for w in waits)
    }
    assert found.compute_ns == len(busy)
    for use in found.links:
        of_link = [t for t in profile[Transfer].rows() if t["link"] == Link[use.link]]
        active = {t for t in range(*window) if any(m["start"] <= t < m["end"] for m in of_link)}
        assert use.busy_ns == len(active)
        assert use.exposed_ns == len(active - busy)
        assert use.overlap == (pytest.approx(len(active & busy) / len(active)) if active else None)
        expected = 0.0
        for m in of_link:
            inside = len(set(range(m["start"], m["end"])) & set(range(*window)))
            if not m["failed"] and m["end"] > m["start"]:
                expected += m["nbytes"] * inside / (m["end"] - m["start"])
        instant = sum(m["nbytes"] for m in of_link if not m["failed"] and m["end"] == m["start"])
        assert expected - 1 <= use.nbytes <= expected + instant + 1
    assert found.verdict


@given(profiles())
def test_any_records_have_a_summary_without_a_window(profile: Profile) -> None:
    found = summarise(profile)
    assert found.idle.total == found.window_ns[1] - found.window_ns[0] - found.compute_ns
    assert found.prefetch.wasted is None or 0 <= found.prefetch.wasted <= 1


def large(count: int) -> Profile:
    """`count` records of a streamed model of 40 layers: reads, copies, uses, waits, spans, memory."""
    profile = profile_of([])
    kinds = {Compute: 0.4, Transfer: 0.25, Use: 0.12, Wait: 0.1, Memory: 0.1, Gauge: 0.02, Step: 0.01}
    rng = np.random.default_rng(0)
    for kind in RECORDS:
        n = int(count * kinds.get(kind, 0.0))
        arrays = {name: rng.integers(0, 4, n) for name in fields_of(kind)}
        at = np.sort(rng.integers(0, 10**12, n))
        for name in ("start", "at", "needed", "issued", "launched"):
            if name in arrays:
                arrays[name] = at
        for name in ("end", "ready"):
            if name in arrays:
                arrays[name] = at + rng.integers(0, 2 * 10**12 // max(n, 1), n)
        if "nbytes" in arrays:
            arrays["nbytes"] = rng.integers(-(10**6), 10**7, n)
        profile.columns[kind] = Columns(kind, arrays)
    return profile


def test_a_large_run_is_computed_without_a_loop_over_its_records() -> None:
    profile = large(200_000)
    began = time.process_time()
    summarise(profile)
    assert time.process_time() - began < 3  # takes a tenth of it; a loop over records would take more


def test_reading_a_profile_needs_no_torch() -> None:
    code = (
        "import sys, penstock.runtime.profiler.metrics\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
