"""The core on a mock clock: exact orders of reads and copies, exact waits.

Ticks: a read takes 10, a copy 4, unless a test says otherwise; disk and link carry one block at a time.
"""

import asyncio
from typing import Any

import pytest
from mockclock import InjectedError, NothingCanRunError, Rig, make_rig, run

from penstock.memory.errors import ClosedError, DoesNotFitError
from penstock.scheduler.lease import Lease

FAIL, WORK = True, False


async def sweeps(rig: Rig, count: int, ticks: int, *, blocks: int = 4, tail: int = 0) -> None:
    for _ in range(count):
        await rig.call(range(blocks), ticks, tail=tail)


# --- one tier -----------------------------------------------------------------------------------------------------


def test_the_disk_never_rests_when_it_binds() -> None:
    rig = make_rig(blocks=4, ring=2)
    run(rig.loop, sweeps(rig, 2, 3))
    # one read after another without a gap, on across the end of the call
    assert rig.logged("read")[:8] == [(10 * i, i % 4) for i in range(8)]
    assert rig.waits == [(0, 10), (1, 7), (2, 7), (3, 7), (0, 7), (1, 7), (2, 7), (3, 7)]
    statistics = rig.core.statistics()
    assert (statistics.acquires, statistics.late, statistics.on_time, statistics.demanded) == (8, 8, 0, 0)
    assert statistics.waited_ns == 10 + 7 * 7
    assert statistics.wasted == 0


def test_the_consumer_never_waits_when_it_binds() -> None:
    rig = make_rig(blocks=4, ring=3)
    run(rig.loop, sweeps(rig, 2, 13))
    assert rig.waits == [(0, 10)] + [(i % 4, 0) for i in range(1, 8)]
    # slots fill at once; from then on a read starts at the very tick at which a lease ends
    assert rig.logged("read")[:8] == [(0, 0), (10, 1), (20, 2), (30, 3), (40, 0), (50, 1), (62, 2), (75, 3)]
    assert rig.core.statistics().on_time == 7


def test_prefetch_runs_on_across_the_end_of_a_call() -> None:
    rig = make_rig(blocks=4, ring=2)

    async def work() -> None:
        await rig.call(range(4), 3)
        await asyncio.sleep(100)
        await rig.call(range(4), 3)

    run(rig.loop, work())
    assert rig.waits[4:6] == [(0, 0), (1, 0)]
    assert [block for _, block in rig.logged("read")[:6]] == [0, 1, 2, 3, 0, 1]


def test_inflight_limit_holds_prefetches_back() -> None:
    rig = make_rig(blocks=4, ring=4, inflight=1)
    seen = []

    async def watch() -> None:
        for _ in range(8):
            seen.append(sum(not held.ready for held in rig.core.front.holding.values()))
            await asyncio.sleep(5)

    run(rig.loop, watch())
    assert max(seen) == 1
    assert rig.logged("read") == [(0, 0), (10, 1), (20, 2), (30, 3)]


def test_permanent_blocks_come_in_order_during_the_first_sweep_and_stay() -> None:
    rig = make_rig(blocks=4, ring=2, permanent=(1, 3))
    run(rig.loop, sweeps(rig, 3, 3))
    assert rig.logged("read") == [(0, 0), (10, 1), (20, 2), (30, 3)]
    assert rig.waits == [(0, 10), (1, 7), (2, 7), (3, 7)] + [(i % 4, 0) for i in range(8)]


def test_half_resident_halves_the_reads() -> None:
    rig = make_rig(blocks=4, ring=1, permanent=(1, 3))
    run(rig.loop, sweeps(rig, 3, 3))
    reads = [block for _, block in rig.logged("read")]
    assert reads[:8] == [0, 1, 3, 2, 0, 2, 0, 2]
    assert sum(wait for _, wait in rig.waits[4:]) == 4 * 7  # reads of 10, behind 3 ticks of the resident neighbour


def test_demand_after_a_wrong_prediction() -> None:
    rig = make_rig(blocks=6, ring=2)

    async def work() -> None:
        rig.core.begin("root")
        await rig.use(0, 3)  # 0..10 read, 10..13 used; block 2 queued behind block 1
        await asyncio.sleep(30)  # 1 and 2 are there
        await rig.use(5, 3)  # not 1: revokes the one that is needed last
        rig.core.end(failed=False)
        await rig.call([0, 5], 3)

    run(rig.loop, work())
    assert rig.logged("read")[:4] == [(0, 0), (10, 1), (20, 2), (43, 5)]
    assert rig.waits[1] == (5, 10)
    statistics = rig.core.statistics()
    assert statistics.demanded == 1
    assert statistics.wasted == 2  # neither 1 nor 2 was used
    kinds = [record.kind for record in rig.core.timeline.records()]
    assert "demand" in kinds
    assert "relearn" in kinds


def test_demand_overtakes_prefetches_in_the_queue() -> None:
    rig = make_rig(blocks=8, ring=5)

    async def work() -> None:
        rig.core.begin("root")
        await asyncio.sleep(15)  # 0 is there, 1 half, 2 to 4 wait
        await rig.use(7, 1)

    run(rig.loop, work())
    # 0 is the only one to revoke; 7 goes before 2, 3 and 4
    assert [block for _, block in rig.logged("read")[:4]] == [0, 1, 7, 2]
    assert rig.waits == [(7, 15)]


def test_nested_leases_each_keep_their_slot() -> None:
    rig = make_rig(blocks=4, ring=3, order=(0, 1, 2, 0, 3))

    async def work() -> None:
        for _ in range(3):
            rig.core.begin("root")
            outer = await rig.acquire(0)
            await rig.use(1, 3)
            await rig.use(2, 3)
            inner = await rig.acquire(0)
            assert inner.residence is outer.residence
            rig.release(inner)
            await rig.use(3, 3)
            rig.release(outer)
            rig.core.end(failed=False)

    run(rig.loop, work())
    assert [wait for block, wait in rig.waits if block == 0][1::2] == [0, 0, 0]
    assert rig.core.statistics().orders.mismatched == 0


def test_a_hopeless_wish_is_refused_at_once() -> None:
    rig = make_rig(blocks=4, ring=2)

    async def work() -> None:
        await rig.acquire(0)
        await rig.acquire(1)
        with pytest.raises(DoesNotFitError) as caught:
            await rig.acquire(2)
        assert rig.loop.ticks() == 20
        assert caught.value.needed_nbytes == 3 * 4096
        assert caught.value.available_nbytes == 2 * 4096
        assert caught.value.tier == "device"

    run(rig.loop, work())


def test_a_failed_prefetch_surfaces_where_the_block_is_needed_and_can_be_tried_again() -> None:
    rig = make_rig(blocks=4, ring=2, failures={2: [FAIL]})

    async def work() -> None:
        rig.core.begin("root")
        await rig.use(0, 30)
        await rig.use(1, 3)
        with pytest.raises(InjectedError, match="block 2"):
            await rig.acquire(2)
        rig.core.end(failed=True)
        await rig.call(range(4), 3)

    run(rig.loop, work())
    assert [block for block, _ in rig.waits] == [0, 1, 0, 1, 2, 3]
    assert [block for _, block in rig.logged("read")].count(2) == 2
    assert "error" in [record.kind for record in rig.core.timeline.records()]


def test_a_failure_while_somebody_waits_reaches_the_waiter() -> None:
    rig = make_rig(blocks=2, ring=1, failures={0: [FAIL]})

    async def work() -> None:
        with pytest.raises(InjectedError):
            await rig.acquire(0)
        await rig.use(0, 3)

    run(rig.loop, work())
    assert rig.waits == [(0, 10)]


def test_a_failed_permanent_block_is_brought_later() -> None:
    rig = make_rig(blocks=2, ring=1, permanent=(0,), failures={0: [FAIL, FAIL]})

    async def work() -> None:
        for _ in range(2):
            with pytest.raises(InjectedError):
                await rig.acquire(0)
        await rig.use(0, 3)
        await asyncio.sleep(50)
        await rig.use(0, 3)

    run(rig.loop, work())
    assert rig.waits == [(0, 10), (0, 0)]


def test_a_slot_is_refilled_only_after_its_last_reader() -> None:
    rig = make_rig(blocks=4, ring=2)
    run(rig.loop, sweeps(rig, 2, 13, tail=9))  # FakeMover asserts that no slot in use is refilled
    # lease of 0 ends at 23, its slot is free at 32; lease of 1 ends at 36, its slot at 45
    assert rig.logged("read")[:5] == [(0, 0), (10, 1), (32, 2), (45, 3), (64, 0)]
    assert rig.waits[:5] == [(0, 10), (1, 0), (2, 6), (3, 0), (0, 6)]


def test_two_consumers_of_one_block_share_it() -> None:
    rig = make_rig(blocks=3, ring=1)

    async def work() -> None:
        first, second = await asyncio.gather(rig.acquire(2), rig.acquire(2))
        assert first.residence is second.residence
        rig.release(first)
        rig.release(second)

    run(rig.loop, work())
    assert [block for _, block in rig.logged("read")].count(2) == 1


def test_forgotten_wishes_hold_nothing() -> None:
    rig = make_rig(blocks=4, ring=1)

    async def work() -> None:
        wish = rig.core.acquire_nowait(3)
        assert not isinstance(wish, Lease)
        rig.core.forget(wish)  # before it was granted
        await asyncio.sleep(40)
        late = rig.core.acquire_nowait(2)
        assert not isinstance(late, Lease)
        await asyncio.wrap_future(late.granted)
        rig.core.forget(late)  # after it was granted
        await rig.use(1, 3)

    run(rig.loop, work())
    assert all(not held.leases for held in rig.core.front.holding.values())


def test_unobserved_accesses_teach_nothing() -> None:
    rig = make_rig(blocks=4, ring=2)

    async def work() -> None:
        rig.core.begin("root")
        for block in range(4):
            await rig.use(block, 3)
            rig.release(await rig.acquire((block + 2) % 4, observed=False))
        rig.core.end(failed=False)

    run(rig.loop, work())
    orders = rig.core.statistics().orders
    assert (orders.matched, orders.mismatched) == (4, 0)


@pytest.mark.parametrize("back_ring", [None, 1])
def test_stop_tells_every_waiter(back_ring: int | None) -> None:
    rig = make_rig(blocks=4, ring=2, back_ring=back_ring)

    async def work() -> None:
        waiting = [asyncio.ensure_future(rig.acquire(block)) for block in (2, 3)]
        await asyncio.sleep(5)
        assert "block 2" in rig.core.report()
        await rig.core.stop(ClosedError("closed"))
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, ClosedError)
        with pytest.raises(ClosedError):
            rig.core.acquire_nowait(0)
        assert rig.loop.ticks() == 5

    run(rig.loop, work())
    assert rig.logged("copy") == []


def test_the_mock_loop_sees_a_deadlock() -> None:
    rig = make_rig(blocks=1, ring=1)

    async def work() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(NothingCanRunError):
        rig.loop.run_until_complete(work())
    run(rig.loop, asyncio.sleep(0))


# --- two tiers ----------------------------------------------------------------------------------------------------


def test_copies_overlap_the_next_read() -> None:
    rig = make_rig(blocks=4, ring=2, back_ring=2)
    run(rig.loop, sweeps(rig, 2, 3))
    assert rig.logged("read")[:8] == [(10 * i, i % 4) for i in range(8)]
    assert rig.logged("copy")[:8] == [(10 + 10 * i, i % 4) for i in range(8)]
    assert rig.waits == [(0, 14), (1, 7), (2, 7), (3, 7), (0, 7), (1, 7), (2, 7), (3, 7)]


def test_chunks_hand_over_early() -> None:
    rig = make_rig(blocks=4, ring=2, back_ring=2, chunks=2)
    run(rig.loop, sweeps(rig, 2, 3))
    assert rig.logged("copy")[:8] == [(5 + 10 * i, i % 4) for i in range(8)]
    assert rig.waits[0] == (0, 12)  # the second half's copy is all that follows the read


def test_one_host_slot_is_refilled_after_its_copy() -> None:
    rig = make_rig(blocks=4, ring=2, back_ring=1)
    run(rig.loop, sweeps(rig, 2, 3, tail=9))
    assert rig.logged("read")[:8] == [(14 * i, i % 4) for i in range(8)]
    assert rig.logged("copy")[:8] == [(10 + 14 * i, i % 4) for i in range(8)]
    assert rig.waits == [(0, 14)] + [(i % 4, 11) for i in range(1, 8)]


def test_blocks_that_stay_on_the_host_are_read_once() -> None:
    rig = make_rig(blocks=4, ring=2, back_ring=2, back_permanent=(0, 2), read_ticks=6)
    run(rig.loop, sweeps(rig, 3, 3))
    reads = [block for _, block in rig.logged("read")]
    assert reads[:4] == [0, 1, 2, 3]
    assert set(reads[4:]) == {1, 3}
    # from the second sweep on the link binds: a copy every 4 ticks
    starts = [tick for tick, _ in rig.logged("copy")][4:12]
    assert starts == list(range(28, 60, 4))
    assert [block for _, block in rig.logged("copy")] == [i % 4 for i in range(len(rig.logged("copy")))]


def test_a_device_slot_is_overwritten_only_after_its_last_reader() -> None:
    rig = make_rig(blocks=4, ring=2, back_ring=3, read_ticks=2)
    run(rig.loop, sweeps(rig, 2, 5, tail=7))  # FakeMover asserts it
    assert [block for block, _ in rig.waits] == [0, 1, 2, 3] * 2


def test_a_failure_behind_the_host_tier_surfaces_and_can_be_tried_again() -> None:
    rig = make_rig(blocks=4, ring=1, back_ring=1, failures={1: [FAIL, FAIL]})  # ahead of need, and on demand

    async def work() -> None:
        rig.core.begin("root")
        await rig.use(0, 60)
        with pytest.raises(InjectedError):
            await rig.acquire(1)
        rig.core.end(failed=True)
        await rig.call(range(4), 3)

    run(rig.loop, work())
    assert [block for block, _ in rig.waits] == [0, 0, 1, 2, 3]


def test_a_broken_drive_is_not_asked_again_and_again_ahead_of_need() -> None:
    rig = make_rig(blocks=4, ring=1, back_ring=2, failures={2: [FAIL] * 50})

    async def work() -> None:
        rig.core.begin("root")
        await rig.use(0, 1000)

    run(rig.loop, work())
    assert [block for _, block in rig.logged("read")].count(2) <= 1


def test_a_copy_that_fails_while_its_block_is_still_read_leaves_the_slot_to_the_read() -> None:
    rig = make_rig(blocks=4, ring=1, back_ring=1, chunks=2)
    copy, failures = rig.mover.copy, [InjectedError("the link")]

    def once(*args: Any) -> None:
        if failures:
            raise failures.pop()
        copy(*args)

    rig.mover.copy = once  # type: ignore[method-assign]

    async def work() -> None:
        rig.core.begin("root")
        with pytest.raises(InjectedError):
            await rig.acquire(0)  # after the first of two chunks
        rig.core.end(failed=True)
        await rig.call(range(4), 3)

    run(rig.loop, work())
    assert rig.core.back is not None
    for tier in (rig.core.front, rig.core.back):
        assert not tier.arriving.keys() - tier.holding.keys()
