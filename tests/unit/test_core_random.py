"""Random schedules, delays and failures on a mock clock: never a wrong block, a slot too many or a deadlock."""

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from mockclock import InjectedError, Rig, make_rig, run

from penstock.memory.errors import ClosedError
from penstock.scheduler.lease import Lease


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    blocks = draw(st.integers(1, 7))
    ticks = st.integers(0, 12)
    each = st.fixed_dictionaries(dict.fromkeys(range(blocks), ticks))
    ids = st.integers(0, blocks - 1)
    two = draw(st.booleans())
    kept = draw(st.sets(ids, max_size=blocks))
    call = st.tuples(st.sampled_from("ab"), st.lists(st.tuples(ids, ticks, st.integers(0, 5)), min_size=1, max_size=9))
    pool = draw(st.lists(call, min_size=1, max_size=3))  # few of them: calls that repeat are what changes what stays
    calls = st.lists(st.sampled_from(pool), min_size=1, max_size=10)
    return {
        "rig": {
            "blocks": blocks,
            "ring": draw(st.integers(2, 4)),
            "permanent": tuple(sorted(kept)),
            "back_ring": draw(st.integers(1, 3)) if two else None,
            "back_permanent": tuple(sorted(draw(st.sets(ids)) - kept)) if two else (),
            "read_ticks": draw(each),
            "copy_ticks": draw(each),
            "chunks": draw(st.integers(1, 3)),
            "failures": draw(st.dictionaries(ids, st.lists(st.booleans(), max_size=4))),
            "order": tuple(draw(st.lists(ids, max_size=8))),
            "droppable": tuple(sorted(draw(st.sets(ids)))),
            "inflight": draw(st.sampled_from([1, 8192, 1 << 40])),
        },
        "calls": draw(calls),
        "nested": draw(st.sets(st.integers(0, 40))),
        "stray": draw(st.lists(st.tuples(ids, ticks), max_size=4)),
    }


async def consume(rig: Rig, schedule: dict[str, Any]) -> int:
    """Run the calls; every acquire ends in a lease or the injected error. Returns how often it was the error."""
    failed = number = 0
    for root, accesses in schedule["calls"]:
        rig.core.begin(root)
        outer: Lease | None = None
        try:
            for block, ticks, tail in accesses:
                number += 1
                lease = await rig.acquire(block)
                await asyncio.sleep(ticks)
                check_slots(rig)
                if outer is not None:
                    rig.release(outer)
                    outer = None
                if number in schedule["nested"]:
                    outer = lease
                else:
                    rig.release(lease, tail=tail)
            rig.core.end(failed=False)
        except InjectedError:
            failed += 1
            rig.core.end(failed=True)
        finally:
            if outer is not None:
                rig.release(outer)
    return failed


def check_slots(rig: Rig) -> None:
    for tier in (rig.core.front, rig.core.back):
        if tier is not None:
            slots = [id(held.slot) for held in tier.holding.values()]
            assert len(slots) == len(set(slots))
            ring = tier.in_ring()
            assert len(ring) + len(tier.free) == tier.ring_slots
            assert not {id(slot) for slot in tier.free} & set(slots)
            kept = [id(slot) for slot in tier.permanent.values()]
            assert len(kept) == len(set(kept))
            assert tier.unloaded == {block for block in tier.permanent if block not in tier.holding}, (
                "a block that stays is forgotten"
            )
            assert all(held.slot is tier.permanent[b] for b, held in tier.holding.items() if held.permanent)


@settings(max_examples=200)
@given(schedule=schedules())
def test_random_schedules(schedule: dict[str, Any]) -> None:
    failures = {block: list(fails) for block, fails in schedule["rig"]["failures"].items()}
    rig = make_rig(**{**schedule["rig"], "failures": failures})
    injected = sum(sum(fails) for fails in failures.values())

    async def work() -> int:
        failed = await consume(rig, schedule)
        await rig.core.stop(ClosedError("closed"))
        return failed

    failed = run(rig.loop, work(), limit=10**5)
    assert failed <= injected
    assert all(not held.leases for held in rig.core.front.holding.values())
    statistics = rig.core.statistics()
    assert statistics.acquires == statistics.on_time + statistics.late + statistics.demanded
    check_slots(rig)


@settings(max_examples=100)
@given(schedule=schedules())
def test_random_schedules_with_a_second_consumer(schedule: dict[str, Any]) -> None:
    """As backward does: a second thread fetches blocks beside the first, unobserved, one at a time."""
    rig = make_rig(**{**schedule["rig"], "failures": {}, "ring": schedule["rig"]["ring"] + 1})

    async def stray() -> None:
        for block, ticks in schedule["stray"]:
            lease = await rig.acquire(block, observed=False)
            await asyncio.sleep(ticks)
            rig.release(lease)

    async def work() -> None:
        await asyncio.gather(consume(rig, schedule), stray())
        await rig.core.stop(ClosedError("closed"))

    run(rig.loop, work(), limit=10**5)
    asked = sum(len(accesses) for _, accesses in schedule["calls"]) + len(schedule["stray"])
    assert len(rig.waits) == asked
    check_slots(rig)
