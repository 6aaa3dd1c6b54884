"""Blocks whose bytes change: nobody has them meanwhile, and every copy that is not changed is dropped."""

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from mockclock import Rig, make_rig, run
from test_core_random import check_slots, consume, schedules

from penstock.memory.errors import ClosedError


async def change(rig: Rig, block: int, ticks: int) -> None:
    """Withdraw a block, change it for some ticks, and give it back."""
    await asyncio.wrap_future(rig.core.withdraw(block))
    for _ in range(ticks + 1):
        check_gone(rig, block)
        await asyncio.sleep(1)
    check_gone(rig, block)
    rig.core.readmit(block)


def check_gone(rig: Rig, block: int) -> None:
    home = rig.core.front if rig.core.back is None else rig.core.back
    for tier in (rig.core.front, rig.core.back):
        held = None if tier is None else tier.holding.get(block)
        assert held is None or (tier is home and held.permanent), "a copy that nobody changes is still there"
        assert held is None or (held.ready, held.leases, held.pins) == (True, 0, 0)


def test_a_change_waits_for_the_lease_and_readers_wait_for_the_change() -> None:
    rig = make_rig(blocks=2, ring=1, permanent=(0,))

    async def work() -> None:
        rig.core.begin("root")
        lease = await rig.acquire(0)  # 0..10
        gone = rig.core.withdraw(0)
        await asyncio.sleep(5)
        assert not gone.done()
        rig.release(lease)  # at 15
        assert gone.done()
        asyncio.get_running_loop().call_later(20, rig.core.readmit, 0)
        await rig.use(0, 1)  # waits until 35, and reads nothing: the slot that stays was changed
        rig.core.end(failed=False)

    run(rig.loop, work())
    assert rig.waits == [(0, 10), (0, 20)]
    assert [block for _, block in rig.logged("read")].count(0) == 1


def test_who_holds_a_withdrawn_block_may_have_it_once_more() -> None:
    rig = make_rig(blocks=1, ring=1)

    async def work() -> None:
        outer = await rig.acquire(0)
        gone = rig.core.withdraw(0)
        inner = await rig.acquire(0)  # else the change would wait for the lease, and the lease for the change
        rig.release(outer)
        assert not gone.done()
        rig.release(inner)
        assert gone.done()
        rig.core.readmit(0)

    run(rig.loop, work())


def test_a_block_that_passes_through_is_read_again() -> None:
    rig = make_rig(blocks=3, ring=3)

    async def work() -> None:
        await rig.call(range(3), 1)
        await asyncio.sleep(50)  # all of them are there
        await change(rig, 1, 5)
        await rig.call(range(3), 1)

    run(rig.loop, work())
    assert [block for _, block in rig.logged("read")] == [0, 1, 2, 1]


def test_what_the_device_keeps_is_copied_again() -> None:
    rig = make_rig(blocks=2, ring=1, permanent=(0,), back_ring=1, back_permanent=())

    async def work() -> None:
        await rig.call([0], 1)
        await asyncio.sleep(50)
        await change(rig, 0, 5)
        await rig.call([0], 1)

    run(rig.loop, work())
    assert [block for _, block in rig.logged("read")].count(0) == 2


@settings(max_examples=150)
@given(schedule=schedules(), changes=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 8)), max_size=8))
def test_random_schedules_with_changes(schedule: dict[str, Any], changes: list[tuple[int, int]]) -> None:
    rig = make_rig(**{**schedule["rig"], "failures": {}})
    blocks = schedule["rig"]["blocks"]

    async def changing() -> None:
        for block, ticks in changes:
            await change(rig, block % blocks, ticks)

    async def work() -> None:
        await asyncio.gather(consume(rig, schedule), changing())
        await rig.core.stop(ClosedError("closed"))

    run(rig.loop, work(), limit=10**5)
    assert len(rig.waits) == sum(len(accesses) for _, accesses in schedule["calls"])
    check_slots(rig)
