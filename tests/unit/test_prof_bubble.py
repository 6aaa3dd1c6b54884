"""Idle time and its causes, against a reference that looks at every instant."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from profiles import profile_of, streamed
from randomprofiles import profiles, windows

from penstock.runtime.profiler.bubble import CAUSES, DISK, Bubble, idle, idle_by_step
from penstock.runtime.profiler.profile import Profile
from penstock.runtime.profiler.schema import Cause, Compute, Link, Phase, Record, Step, Transfer, Use, Wait
from penstock.runtime.profiler.summary import Idle

MS = 1_000_000


def reference(profile: Profile, start: int, end: int) -> Idle:
    """Instant by instant."""
    spans, waits = list(profile[Compute].rows()), list(profile[Wait].rows())
    uses = sorted(profile[Use].rows(), key=lambda use: (max(use["at"], use["ready"]), use["at"]))
    moves = list(profile[Transfer].rows())

    def cause(t: int) -> str:
        use = next((use for use in uses if max(use["at"], use["ready"]) > t), None)
        if use is None:
            return "other"
        mine = [m["link"] for m in moves if m["block"] == use["block"] != -1 and m["start"] <= t < m["end"]]
        if Link.DISK_READ in mine:
            return "disk"
        if Link.H2D in mine:
            return "link"
        return "space" if t < use["ready"] else "host"

    counts: Counter[str] = Counter()
    for t in range(start, end):
        computing = any(span["start"] <= t < span["end"] for span in spans)
        if not computing or any(wait["needed"] <= t < wait["ready"] for wait in waits):
            counts[cause(t)] += 1
    return Idle(**counts)


@given(profiles(), windows)
def test_every_instant_is_charged_as_the_reference_charges_it(profile: Profile, window: tuple[int, int]) -> None:
    assert idle(profile, *window) == reference(profile, *window)


@given(profiles())
def test_steps_are_charged_one_by_one(profile: Profile) -> None:
    steps = sorted((s for s in profile[Step].rows() if s["end"] >= s["start"]), key=lambda step: step["start"])
    expected = tuple((step["id"], reference(profile, step["start"], step["end"])) for step in steps)
    assert idle_by_step(profile) == expected


@given(profiles(), windows)
def test_blocks_share_what_a_cause_is_charged(profile: Profile, window: tuple[int, int]) -> None:
    bubble = Bubble.of(profile, *window)
    for cause, name in enumerate(CAUSES):
        assert sum(bubble.by_block(cause).values()) == getattr(bubble.idle(*window), name)


def test_a_streamed_model_that_the_disk_binds_waits_for_reads() -> None:
    profile = streamed()
    (_, first), *later = idle_by_step(profile)
    others = [found for _, found in later]
    assert [number for number, _ in later] == [1, 2, 3, 4, 5]
    assert first == Idle(disk=22 * MS)  # 10 ms for the first layer, 4 ms for each of the others
    assert others == [Idle(disk=16 * MS)] * 5
    assert Bubble.of(profile, 46 * MS, 246 * MS).by_block(DISK) == dict.fromkeys(range(4), 20 * MS)


def transfer(link: Link, start: int, end: int) -> Transfer:
    return Transfer(id=0, block=0, link=link, nbytes=1, cause=Cause.PREFETCH, issued=start, start=start, end=end)


def test_one_block_on_its_way_is_charged_to_each_cause_in_turn() -> None:
    records: list[Record] = [
        transfer(Link.DISK_READ, 10, 30),
        transfer(Link.H2D, 25, 50),  # the copy begins while the read still runs: until 30 the disk is to blame
        Use(block=0, at=60, ready=50, issued=10, module=1),
        Compute(module=1, phase=Phase.FORWARD, start=65, end=80),
    ]
    profile = profile_of(records)
    assert idle(profile, 0, 100) == Idle(disk=20, link=20, space=10, host=10, other=5 + 20)
    assert idle(profile, 0, 100).total == 100 - 15


def test_a_use_that_waits_is_charged_until_its_block_is_there() -> None:
    # The instants after the use was asked for belong to it, not to the use that follows.
    records: list[Record] = [
        transfer(Link.DISK_READ, 0, 20),
        Use(block=0, at=5, ready=20, issued=0),
        Wait(block=0, needed=5, ready=20),
        Use(block=1, at=30, ready=-1, issued=-1),
    ]
    assert idle(profile_of(records), 5, 30) == Idle(disk=15, host=10)


def test_a_module_that_waits_does_not_compute() -> None:
    records: list[Record] = [
        Compute(module=0, phase=Phase.FORWARD, start=0, end=50),
        Wait(block=0, needed=10, ready=20),
    ]
    assert idle(profile_of(records), 0, 50) == Idle(other=10)


@pytest.mark.parametrize("window", [(0, 0), (7, 7), (500, 400)])
def test_nothing_is_idle_in_no_time(window: tuple[int, int]) -> None:
    assert idle(streamed(1), *window) == Idle()


def test_an_empty_run_has_no_steps() -> None:
    assert idle_by_step(profile_of([])) == ()
    assert idle(profile_of([]), 0, 10) == Idle(other=10)
