"""The sentence that a report opens with."""

from __future__ import annotations

from typing import Any

import pytest
from profiles import MIB, footer, header, profile_of, streamed

from penstock.runtime.profiler.metrics import summarise
from penstock.runtime.profiler.profile import Profile
from penstock.runtime.profiler.schema import (
    Block,
    Category,
    Cause,
    Compute,
    Link,
    Memory,
    Phase,
    Record,
    Step,
    Tier,
    Transfer,
    Use,
    Wait,
)

MS = 1_000_000


def said(profile: Profile) -> str:
    return summarise(profile).verdict


def changed(profile: Profile, **values: Any) -> Profile:
    profile.header = header(**values)
    return profile


def test_a_run_that_waits_for_all_layers_alike() -> None:
    assert said(streamed()) == (
        "disk-bound: 100 % of idle time waits on reads of 4 blocks alike; "
        "more host memory would help most (the budget is 512 MiB of 1 GiB)"
    )
    assert said(changed(streamed(), budgets={})).endswith("; more host memory would help most")


def test_layers_that_stand_out_are_named() -> None:
    # GIVEN ten layers of which three are read just before their use
    records: list[Record] = []
    for layer in range(10):
        start = 20 * MS * layer
        if layer in (2, 7, 5):
            records += [
                Wait(block=layer, needed=start, ready=start + 10 * MS),
                Use(block=layer, at=start, ready=start + 10 * MS, issued=start),
                move(layer, start, start + 10 * MS),
            ]
        else:
            records.append(Use(block=layer, at=start, ready=-1, issued=-1))
        records.append(Compute(module=0, phase=Phase.FORWARD, start=start, end=start + 20 * MS))
    blocks = {n: Block(name=f"model.layers.{n}", nbytes=10 * MIB, home=Tier.DISK, module=-1) for n in range(10)}
    profile = profile_of(records, blocks=blocks, budgets={}, peaks={})
    # THEN they are named in the order of the model
    assert said(profile) == (
        "disk-bound: 100 % of idle time waits on reads of layers 2, 5, 7; more host memory would help most"
    )
    profile.blocks[5] = Block(name="lm_head", nbytes=1, home=Tier.DISK, module=-1)
    assert "reads of model.layers.2, lm_head, model.layers.7;" in said(profile)


def move(block: int, start: int, end: int, *, link: Link = Link.DISK_READ) -> Transfer:
    return Transfer(
        id=0, block=block, link=link, nbytes=10 * MIB, cause=Cause.DEMAND, issued=start, start=start, end=end
    )


def one_wait(*moves: Transfer, **changes: Any) -> Profile:
    """20 ms of waiting for block 0 before 30 ms of computing."""
    records: list[Record] = [
        *moves,
        Wait(block=0, needed=0, ready=20 * MS),
        Use(block=0, at=0, ready=20 * MS, issued=0, module=1),
        Compute(module=1, phase=Phase.FORWARD, start=20 * MS, end=50 * MS),
    ]
    return profile_of(records, **{"budgets": {}, **changes})


def test_a_slow_disk_and_late_reads_are_told_apart() -> None:
    read = move(0, 0, 20 * MS)
    slow = one_wait(read, peaks={"DISK_READ": 5e9})
    assert "disk-bound" in said(slow)
    assert "reads reach 10 % of the measured peak, and larger ones or more at once would help most" in said(slow)
    late = one_wait(read, peaks={"DISK_READ": 6e8})
    assert said(late) == (
        "late reads: 100 % of idle time waits on reads of layer 0, which computing could hide; "
        "more slots to bring blocks ahead would help most"
    )


def test_waiting_for_copies_and_for_slots() -> None:
    copies = said(one_wait(move(0, 0, 20 * MS, link=Link.H2D)))
    assert copies == (
        "link-bound: 100 % of idle time waits on copies to the device of layer 0; more device memory would help most"
    )
    slots = said(one_wait(move(0, 15 * MS, 20 * MS)))
    assert slots.startswith("short of slots: in 75 % of idle time the transfer of layer 0 had not begun; ")


def test_waiting_for_the_host() -> None:
    records: list[Record] = []
    for step in range(4):
        start = 40 * MS * step
        records += [
            Use(block=0, at=start + 20 * MS, ready=-1, issued=-1, module=1),
            Compute(module=1, phase=Phase.FORWARD, start=start + 20 * MS, end=start + 40 * MS),
            Step(id=step, phase=0, start=start, end=start + 40 * MS),
        ]
    assert said(profile_of(records)).startswith("held up by the host: in 100 % of idle time the next block was there")


def test_a_run_that_computes_all_the_time_needs_nothing() -> None:
    loaded = "100 % of the time computes, and the disk at its measured rate takes as long; nothing needs doing"
    assert said(streamed(read_ns=2 * MS)) == f"compute-bound: {loaded}"
    hidden = changed(streamed(read_ns=2 * MS), peaks={"DISK_READ": 6e9})
    assert said(hidden) == "compute-bound: 100 % of the time computes and hides what moves; nothing needs doing"
    alone = profile_of([Compute(module=0, phase=Phase.FORWARD, start=0, end=10)])
    assert said(alone).endswith("100 % of the time computes and nothing moved; only faster computing would help")


def test_a_plain_script_that_idles_between_its_modules() -> None:
    spans = [Compute(module=0, phase=Phase.FORWARD, start=100 * i, end=100 * i + 40) for i in range(10)]
    assert said(profile_of(spans)).startswith("idle between modules: 43 % of the time computes")


def test_idling_after_the_last_use() -> None:
    records: list[Record] = [
        Use(block=0, at=0, ready=-1, issued=-1),
        Compute(module=0, phase=Phase.FORWARD, start=0, end=10),
        Step(id=0, phase=0, start=0, end=100),
    ]
    assert said(profile_of(records)).startswith("idle after the streamed model: 100 % of idle time")


def test_nothing_and_half_of_something() -> None:
    assert said(profile_of([])) == "nothing was recorded"
    step = Step(id=0, phase=0, start=0, end=100)
    assert said(profile_of([step])) == "no module computed and nothing moved while this was recorded"
    assert said(profile_of([step, move(0, 0, 50)])).startswith("no computing was recorded, only blocks that moved")


def test_what_makes_the_figures_doubtful_is_said() -> None:
    profile = changed(streamed(), emulated=True)
    profile.footer = footer(recorded=800, dropped=200)
    assert said(profile).startswith("emulated: disk-bound: ")
    assert said(profile).endswith("; 20 % of the records were lost: the figures cover only what was kept")
    profile.footer = footer(recorded=10_000, dropped=1)
    assert "lost" not in said(profile)


@pytest.mark.parametrize(("nbytes", "words"), [(100, "100 bytes"), (3 * 2**10, "3 KiB"), (3 * 2**29, "1.5 GiB")])
def test_a_leak_is_said(nbytes: int, words: str) -> None:
    records: list[Record] = []
    for step in range(8):
        at = 100 * step
        records += [
            Step(id=step, phase=0, start=at, end=at + 100),
            Compute(module=0, phase=Phase.FORWARD, start=at, end=at + 100),
            Memory(at=at + 50, tier=Tier.HOST, category=Category.ACTIVATION, nbytes=nbytes, module=2),
        ]
    assert said(profile_of(records)).endswith(f"; host memory grows by {words} each step, most of it in layers.1")
