"""Prefetching is done where a simulation says that it gains and a link is idle, and stops where it does not pay."""

from __future__ import annotations

import logging

import pytest
from moe_traces import costs, task

from penstock.scheduler.experts.idle import IdleTime
from penstock.scheduler.experts.layerscheduler import LayerScheduler
from penstock.scheduler.experts.prefetch import Prefetched, Prefetcher
from penstock.scheduler.hardware import Sharing

SLOW_CPU = {"cpu": (20.0, 1.0)}
"""What is not on the device is copied, for 4 s each."""


def idle(scheduler: LayerScheduler, *, seconds: float, between_s: float = 0.0) -> IdleTime:
    """What a layer leaves that computes so long with what is there."""
    plan = scheduler.plan([task(0, round((seconds - 1) / 0.1), device=True, host=False)])
    return IdleTime.behind(plan, scheduler.costs, between_s)


def test_what_gains_most_is_brought_as_long_as_the_link_is_idle() -> None:
    scheduler = LayerScheduler(costs(**SLOW_CPU))
    prefetcher = Prefetcher(scheduler, most=8)
    expected = [task(0, 1, device=True), task(1, 1), task(2, 30), task(3, 9)]
    left = idle(scheduler, seconds=9)
    chosen = prefetcher.choose(expected, left)
    assert len(chosen) == 2, "9 s hold two copies of 4 s"
    assert {each.mover for each in chosen} == {"link"}
    assert left.free_s["link"] == 8
    assert 0 not in {each.expert for each in chosen}, "it is there"


def test_each_choice_is_the_best_single_one() -> None:
    scheduler = LayerScheduler(costs(**SLOW_CPU))
    expected = [task(1, 1), task(2, 300), task(3, 90)]
    (first,) = Prefetcher(scheduler, most=1).choose(expected, idle(scheduler, seconds=30))

    def after(expert: int) -> float:
        return scheduler.plan([task(t.expert, t.rows, device=t.expert == expert) for t in expected]).seconds

    assert after(first.expert) == min(after(each.expert) for each in expected)


def test_nothing_is_brought_over_a_busy_link_or_without_gain() -> None:
    scheduler = LayerScheduler(costs(**SLOW_CPU))
    prefetcher = Prefetcher(scheduler, most=8)
    assert prefetcher.choose([task(1)], idle(scheduler, seconds=3)) == ()
    assert prefetcher.statistics().busy == 1
    assert len(prefetcher.choose([task(1)], idle(scheduler, seconds=3, between_s=1.5))) == 1, "attention comes between"
    assert prefetcher.choose([task(1, device=True)], idle(scheduler, seconds=30)) == ()
    assert prefetcher.choose([], idle(scheduler, seconds=30)) == ()
    fast = LayerScheduler(costs(cpu=(0.1, 0.1), device=(1, 1)))
    assert Prefetcher(fast, most=8).choose([task(1)], idle(fast, seconds=30)) == (), "the CPU is faster than the device"
    copying = fast.plan([task(1, 100), task(2, 100)])
    assert IdleTime.behind(copying, fast.costs, 0).free_s["link"] == copying.timeline.last_s("link")


def test_what_is_on_disk_comes_into_host_memory() -> None:
    scheduler = LayerScheduler(costs(device=None))
    chosen = Prefetcher(scheduler, most=1).choose(
        [task(1, host=False), task(2)],
        IdleTime(costs=scheduler.costs, end_s=12, cpu_until_s=12, free_s={"link": 0, "disk": 0}),
    )
    assert chosen == (Prefetched(expert=1, mover="disk", cost_s=0.0),)


def test_what_is_being_read_is_not_copied_before_it_is_there() -> None:
    scheduler = LayerScheduler(costs(**SLOW_CPU))
    chosen = Prefetcher(scheduler, most=8).choose(
        [task(1, 300, host=False), task(2, 300, host=False)],
        IdleTime(costs=scheduler.costs, end_s=1e3, cpu_until_s=0, free_s={"link": 0, "disk": 0}),
    )
    assert chosen
    assert len({each.expert for each in chosen}) == len(chosen)
    assert {each.mover for each in chosen} == {"disk"}


def test_what_the_cpu_loses_meanwhile_counts() -> None:
    def left(speed: float) -> IdleTime:
        cost = costs(**SLOW_CPU, sharing=Sharing(compute_while_copying=speed))
        return IdleTime(costs=cost, end_s=20, cpu_until_s=20, free_s={"link": 0, "disk": 0})

    assert left(1.0).slows_by_s("link") == 0
    assert left(0.5).slows_by_s("link") == 2.0
    nothing = left(0.2)
    nothing.cpu_until_s = 1.0
    assert nothing.slows_by_s("link") == pytest.approx(0.8)
    for speed, count in ((1.0, 1), (0.2, 0)):
        there = left(speed)
        chosen = Prefetcher(LayerScheduler(there.costs), most=1).choose([task(1)], there)
        assert len(chosen) == count, "half of 4 s that may be gained, against what the CPU loses"


def test_gains_are_those_of_what_was_needed_after_all() -> None:
    scheduler = LayerScheduler(costs(**SLOW_CPU))
    prefetcher = Prefetcher(scheduler, most=8)
    brought = [Prefetched(expert=1, mover="link", cost_s=0.25), Prefetched(expert=2, mover="link", cost_s=0.25)]
    needed = [task(1), task(3)]
    gained = prefetcher.settle(needed, brought)
    without, with_it = scheduler.plan(needed).seconds, scheduler.plan([task(1, device=True), task(3)]).seconds
    assert gained == pytest.approx(without - with_it - 0.5)
    assert prefetcher.settle(needed, []) == 0
    found = prefetcher.statistics()
    assert (found.prefetched, found.used) == (2, 1)
    assert found.gained_s == pytest.approx(gained)


def test_it_stops_where_it_does_not_pay_and_says_so_and_tries_again(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = LayerScheduler(costs(**SLOW_CPU))
    prefetcher = Prefetcher(scheduler, most=1, trial=10, pause=5)
    wrong = [Prefetched(expert=9, mover="link", cost_s=0.001)]
    with caplog.at_level(logging.INFO):
        for _ in range(10):
            assert prefetcher.statistics().off == ""
            prefetcher.settle([task(1)], wrong)
    off = prefetcher.statistics().off
    assert off.startswith("of the last 10 prefetched experts 0 were used, and they cost 10 ms more than they saved")
    assert off.endswith("tried again in 5 layers")
    assert off in caplog.text
    for _ in range(4):
        assert prefetcher.choose([task(1)], idle(scheduler, seconds=30)) == ()
    assert len(prefetcher.choose([task(1)], idle(scheduler, seconds=30))) == 1
    assert prefetcher.statistics().off == ""
    for _ in range(10):
        prefetcher.settle([task(1)], wrong)
    assert "tried again in 10 layers" in prefetcher.statistics().off, "twice as long"


def test_it_goes_on_where_it_pays() -> None:
    scheduler = LayerScheduler(costs(**SLOW_CPU))
    prefetcher = Prefetcher(scheduler, most=1, trial=10)
    for _ in range(30):
        prefetcher.settle([task(1)], [Prefetched(expert=1, mover="link", cost_s=0.01)])
    assert prefetcher.statistics().off == ""
    assert prefetcher.statistics().gained_s > 0
