"""Limits: what holds, what does not and what it says; what was not measured; baselines."""

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from summaries import DISK, HOST, MIB, MS, module, summary, without_figures

from penstock.memory.errors import UsageError
from penstock.runtime.profiler.comparison import compare, compare_modules, figures
from penstock.runtime.profiler.limits import Limits, judge, judge_against
from penstock.runtime.profiler.summary import Idle, Leak, Summary


def sentences(found: Summary, **limits: Any) -> list[tuple[bool, str]]:
    return [(judgement.holds, judgement.sentence) for judgement in judge(found, Limits(**limits))]


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"host_peak": 220 * MIB}, "host peak 220.00 MiB (at most 220.00 MiB)"),
        ({"device_peak": MIB}, "device peak 0 B (at most 1.00 MiB)"),
        ({"max_bubble": 0.4}, "bubble 40.0% (at most 40.0%)"),
        ({"max_distance": 1.25}, "distance 1.25 (at most 1.25)"),
        ({"min_on_time": 0.9}, "on time 90.0% (at least 90.0%)"),
        ({"min_overlap": {"disk_read": 0.6}}, "disk_read overlap 60.0% (at least 60.0%)"),
        ({"no_leaks": True}, "no leaks in 5 steps"),
    ],
)
def test_a_limit_that_is_just_kept_holds(limits: Mapping[str, Any], sentence: str) -> None:
    assert sentences(summary(), **limits) == [(True, sentence)]


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        (
            {"host_peak": 200 * MIB},
            "host peak 220.00 MiB is over the limit of 200.00 MiB by 20.00 MiB: lower the host budget (max_memory) or "
            "what takes it (largest: baseline 190.00 MiB, arena 20.00 MiB)",
        ),
        (
            {"max_bubble": 0.2},
            "bubble 40.0% is over the limit of 20.0%: 75.0% of it is disk, where blocks were still being read: more "
            "host memory keeps more of them off the disk",
        ),
        (
            {"max_distance": 1.15},
            "distance 1.25 is over the limit of 1.15: it took 1.25 times what disk_read allows; 75.0% of the idle time "
            "is disk, where blocks were still being read: more host memory keeps more of them off the disk",
        ),
        (
            {"min_on_time": 0.95},
            "on time 90.0% is under the limit of 95.0%: 80.00 ms were waited for blocks; a larger budget keeps more of "
            "them and prefetches further ahead",
        ),
        (
            {"min_overlap": {"disk-read": 0.8}},
            "disk_read overlap 60.0% is under the limit of 80.0%: 80.00 ms of moving had no compute beside it; a "
            "larger budget prefetches further ahead, a larger batch computes longer",
        ),
    ],
)
def test_a_limit_that_is_not_kept_says_measured_limit_and_remedy(limits: Mapping[str, Any], sentence: str) -> None:
    assert sentences(summary(), **limits) == [(False, sentence)]


def test_more_memory_is_no_remedy_where_half_of_what_is_brought_is_for_nothing() -> None:
    prefetch = msgspec.structs.replace(summary().prefetch, wasted=0.5)
    (found,) = sentences(summary(prefetch=prefetch), max_bubble=0.2)
    assert found[1].endswith(
        "75.0% of it is disk, where blocks were still being read: 50.0% of what was brought is never used, and the "
        "verdict tells why"
    )
    by_the_host = summary(prefetch=prefetch, idle=Idle(disk=20 * MS, host=60 * MS))
    assert sentences(by_the_host, max_bubble=0.2)[0][1].endswith("larger batches, or less Python between layers")


def test_each_leak_is_a_line() -> None:
    leaks = (
        Leak(tier="HOST", nbytes_per_step=MIB, steps=20, module="layers.3"),
        Leak(tier="DEVICE", nbytes_per_step=2 * MIB, steps=20),
    )
    assert sentences(summary(leaks=leaks), no_leaks=True) == [
        (
            False,
            "host memory grows by 1.00 MiB per step over 20 steps, and no growth is allowed: look for tensors kept in "
            "layers.3",
        ),
        (
            False,
            "device memory grows by 2.00 MiB per step over 20 steps, and no growth is allowed: look for tensors kept "
            "that outlive their step",
        ),
    ]


def test_what_was_not_measured_does_not_hold() -> None:
    found = sentences(
        without_figures(),
        host_peak=MIB,
        max_bubble=1.0,
        max_distance=9.0,
        min_on_time=0.0,
        min_overlap={"h2d": 0.0},
        no_leaks=True,
    )
    assert len(found) == 6
    assert not any(holds for holds, _ in found)
    assert all("cannot be told: " in sentence and "; record " in sentence for _, sentence in found)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_bubble": 1.5}, "max_bubble is a share between 0 and 1"),
        ({"min_on_time": float("nan")}, "min_on_time is a share"),
        ({"min_overlap": {"h2d": -1.0}}, "min_overlap of h2d is a share"),
        ({"max_distance": 0.5}, "at least 1, not 0.5"),
        ({"max_distance": float("inf")}, "at least 1, not inf"),
        ({"min_overlap": {"pcie": 0.5}}, "links are disk_read, disk_write, h2d, d2h"),
    ],
)
def test_limits_that_mean_nothing_are_refused(limits: Mapping[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Limits(**limits)


def test_a_run_is_no_worse_than_itself() -> None:
    found = judge_against(summary(), summary(), 0.0)
    assert all(judgement.holds for judgement in found)
    assert [judgement.sentence.split(",")[0] for judgement in found] == [
        "time per step 40.00 ms",
        "tokens per second 25.00/s",
        "bubble 40.0%",
        "distance 1.25",
        "on time 90.0%",
        "disk_read overlap 60.0%",
        "host peak 220.00 MiB",
    ]


def test_a_baseline_tolerates_parts_of_figures_and_points_of_shares() -> None:
    slower = summary(step_ns=42 * MS, bubble=0.45, tokens_per_s=30.0)
    assert all(judgement.holds for judgement in judge_against(slower, summary(), 0.0501))
    worse = [each.sentence for each in judge_against(slower, summary(), 0.04) if not each.holds]
    assert worse == [
        "time per step 42.00 ms is worse than the baseline's 40.00 ms (+5.0%), and 4% are tolerated: compare the two "
        "with penstock prof diff, or record a new baseline if the change is meant",
        "bubble 45.0% is worse than the baseline's 40.0% (+5.0 points), and 4 points are tolerated: compare the two "
        "with penstock prof diff, or record a new baseline if the change is meant",
    ]


def test_a_figure_that_vanished_fails_but_a_link_that_rests_does_not() -> None:
    gone = [each.sentence for each in judge_against(summary(links=(), step_ns=None), summary(), 0.05) if not each.holds]
    assert gone == ["time per step cannot be told: the baseline has 40.00 ms; record both runs alike"]


def test_growth_from_nothing_is_worse_and_has_no_per_cent() -> None:
    nothing = summary(peaks=(msgspec.structs.replace(HOST, tier="DEVICE", nbytes=0),))
    some = summary(peaks=(msgspec.structs.replace(HOST, tier="DEVICE"),))
    (change,) = [each for each in compare(nothing, some) if each.name == "device peak"]
    assert (change.change, change.worsening, change.change_text) == (None, float("inf"), "")
    (back,) = [each for each in compare(some, nothing) if each.name == "device peak"]
    assert (back.change, back.worsening) == (-1.0, 0.0)
    assert not judge_against(without_figures(), without_figures(), 0.05)[0].holds


def test_figures_that_count_come_first_and_links_have_their_own() -> None:
    found = figures(summary(links=(DISK, msgspec.structs.replace(DISK, link="H2D"))))
    gates = [figure.gates for figure in found]
    assert gates == sorted(gates, reverse=True)
    assert {figure.link for figure in found} == {"", "DISK_READ", "H2D"}
    assert sum(f.value or 0 for f in found if f.name.startswith("idle")) == 80 * MS / 5


def test_modules_are_compared_per_step_largest_change_first() -> None:
    before = summary(modules=(module("a"), module("gone", self_ns=5 * MS, waited_ns=0)))
    after = summary(steps=10, modules=(module("a"), module("new", waited_ns=70 * MS)), idle=Idle())
    changes = compare_modules(before, after)
    assert [(change.path, change.change_ns) for change in changes] == [
        ("new", 7 * MS),
        ("a", -3 * MS),
        ("gone", -1 * MS),
    ]
    assert changes[1].moved_after == 5 * MIB
