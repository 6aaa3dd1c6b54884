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
    Mark,
    MarkKind,
    Memory,
    Module,
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
    assert "reads reach 10 % of the measured peak; larger ones or more at once would help most" in said(slow)
    late = one_wait(read, peaks={"DISK_READ": 6e8})
    assert said(late) == (
        "late reads: 100 % of idle time waits on reads of layer 0; computing could hide them: "
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


def shuffled(
    *, wasted: int, strays: int, steps: int = 4, waits_ns: int = 20 * MS, link: Link = Link.DISK_READ
) -> Profile:
    """Each step uses block 0, which is read for it, and `wasted` times block 3 is read that nobody uses."""
    records: list[Record] = []
    for step in range(steps):
        start = 100 * MS * step
        records += [
            move(0, start, start + 20 * MS, link=link),
            *(move(3, start + (20 + i) * MS, start + (21 + i) * MS, link=link) for i in range(wasted)),
            *(Mark(at=start, kind=(MarkKind.DEMAND, MarkKind.MISMATCH)[i % 2], block=0) for i in range(strays)),
            Wait(block=0, needed=start, ready=start + waits_ns),
            Use(block=0, at=start, ready=start + waits_ns, issued=start, module=1),
            Compute(module=1, phase=Phase.FORWARD, start=start + waits_ns, end=start + 100 * MS),
            Step(id=step, phase=0, start=start, end=start + 100 * MS),
        ]
    return profile_of(records, budgets={}, peaks={})


ORDER = "the same order in every call would help most"


def test_reads_for_nothing_are_named_with_their_modules_and_take_the_place_of_other_advice() -> None:
    # GIVEN three steady steps that read 30 MiB each, of which 20 MiB are of a layer that is not used
    assert said(shuffled(wasted=2, strays=1)) == (
        "disk-bound: 100 % of idle time waits on reads of layer 0; 67 % of what is brought is for nothing "
        "(20 MiB read per step, for layer 3), as blocks come in another order than predicted; " + ORDER
    )
    copies = said(shuffled(wasted=2, strays=1, link=Link.H2D))
    assert "(20 MiB copied to the device per step, for layer 3)" in copies
    hidden = said(shuffled(wasted=2, strays=1, waits_ns=MS))
    assert hidden.startswith("compute-bound: 99 % of the time computes and hides what moves; 67 % of what is brought")
    assert hidden.endswith(ORDER)


def test_waste_without_a_broken_order_is_not_blamed_on_the_order() -> None:
    assert said(shuffled(wasted=1, strays=0)).endswith(
        "50 % of what is brought is for nothing (10 MiB read per step, for layer 3), though in the predicted order: it "
        "made room for others, or was for calls that never came; recording more steps would tell which"
    )
    span = Compute(module=1, phase=Phase.FORWARD, start=0, end=10)
    without_steps = said(profile_of([move(3, 0, 5), Use(block=0, at=0, ready=-1, issued=-1), span]))
    assert "100 % of what is brought is for nothing (10 MiB read in all, for layer 3), though" in without_steps
    assert "for nothing" not in said(profile_of([move(3, 0, 5), span])), "there was no call to bring it for"


def test_a_little_waste_is_not_worth_a_word() -> None:
    profile = shuffled(wasted=0, strays=1)
    assert "for nothing" not in said(profile)
    # one read of eight is for nothing: 12.5 %
    steps = [record for step in range(8) for record in (move(0, step * 100, step * 100 + 10), Use(
        block=0, at=step * 100, ready=step * 100 + 10, issued=step * 100))]  # fmt: skip
    steps.append(Compute(module=1, phase=Phase.FORWARD, start=0, end=900))
    assert "for nothing" not in said(profile_of([*steps, move(3, 850, 860)]))
    assert "20 % of what" not in said(profile_of([*steps, move(3, 850, 860), move(2, 850, 860)]))


def test_advice_about_the_program_stays_beside_what_is_wasted() -> None:
    records: list[Record] = []
    for step in range(4):
        start = 40 * MS * step
        records += [
            move(3, start, start + 10),
            Mark(at=start, kind=MarkKind.DEMAND, block=0),
            Use(block=0, at=start + 20 * MS, ready=-1, issued=-1, module=1),
            Compute(module=1, phase=Phase.FORWARD, start=start + 20 * MS, end=start + 40 * MS),
            Step(id=step, phase=0, start=start, end=start + 40 * MS),
        ]
    text = said(profile_of(records))
    assert "nothing was asked to compute; 100 % of what is brought is for nothing (10 MiB read per step" in text
    assert text.endswith("less work between layers and steps (Python, sampling, tokenising) would help most")


def test_waste_of_many_modules_alike_is_counted_not_listed() -> None:
    moves = [move(block, 10 * block, 10 * block + 5) for block in range(16)]
    modules = {n: Module(path=f"layers.{n}", kind="Layer", parent=-1) for n in range(8)}
    blocks = {n: Block(name=f"layers.{n // 2}.{n}", nbytes=1, home=Tier.DISK, module=n // 2) for n in range(16)}
    spans = [Compute(module=0, phase=Phase.FORWARD, start=0, end=200), Use(block=20, at=0, ready=-1, issued=-1)]
    assert ", for 8 modules alike)" in said(profile_of([*moves, *spans], modules=modules, blocks=blocks))
    assert ", for layers 0, 1, 2)" in said(profile_of([*moves[:6], *spans], modules=modules, blocks=blocks))
    blocks[0] = Block(name="a table", nbytes=1, home=Tier.DISK, module=-1)
    assert ", for a table)" in said(profile_of([*moves[:1], *spans], modules=modules, blocks=blocks))
