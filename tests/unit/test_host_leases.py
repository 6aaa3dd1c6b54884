"""Leases on the host's copies, on a mock clock: what is computed there is brought, kept, and copied to no device."""

import asyncio

import pytest
from mockclock import InjectedError, Rig, make_rig, run

from penstock.memory.errors import ClosedError
from penstock.scheduler.lease import Lease

BACK = (0, 1, 2, 3)


def rig_of(**options: object) -> Rig:
    """Six blocks, of which four stay in the host; nothing stays on the device."""
    made: dict[str, object] = {"blocks": 6, "ring": 2, "back_ring": 2, "back_permanent": BACK, "order": ()}
    return make_rig(**{**made, **options})  # type: ignore[arg-type]


async def lease_host(rig: Rig, block: int) -> Lease:
    got = rig.core.acquire_host_nowait(block)
    lease = got if isinstance(got, Lease) else await asyncio.wrap_future(got.granted)
    lease.residence.slot.check_stamp(block)
    rig.check(lease)
    return lease


def test_a_block_is_read_once_and_never_copied() -> None:
    rig = rig_of()

    async def work() -> None:
        for _ in range(3):
            lease = await lease_host(rig, 2)
            await asyncio.sleep(5)
            rig.core.release(lease, None)

    run(rig.loop, work())
    assert rig.logged("read") == [(0, 2)]
    assert rig.logged("copy") == []
    statistics = rig.core.statistics()
    assert (statistics.on_cpu, statistics.acquires, statistics.orders.calls) == (3, 0, 0)
    assert statistics.waited_ns == 10


def test_blocks_for_the_cpu_come_though_no_order_names_them() -> None:
    rig = rig_of(on_cpu=(1, 3))
    run(rig.loop, asyncio.sleep(100))
    assert rig.logged("read") == [(0, 1), (10, 3)]
    assert rig.logged("copy") == []


def test_two_who_wait_for_one_block_get_it_together() -> None:
    rig = rig_of()

    async def work() -> None:
        first, second = await asyncio.gather(lease_host(rig, 1), lease_host(rig, 1))
        assert first.residence is second.residence
        assert first.residence.leases == 2
        rig.core.release(first, None)
        rig.core.release(second, None)
        assert first.residence.leases == 0

    run(rig.loop, work())
    assert rig.logged("read") == [(0, 1)]


def test_device_and_cpu_read_the_same_slot() -> None:
    """A prompt is computed on the device while somebody holds the host's copy; both are served by one read."""
    rig = rig_of(order=(1, 4, 1, 4))

    async def work() -> None:
        host = await lease_host(rig, 1)
        await rig.call([1, 4], 3)
        rig.check(host)
        rig.core.release(host, None)

    run(rig.loop, work())
    assert [block for _, block in rig.logged("read")].count(1) == 1
    assert 1 in {block for _, block in rig.logged("copy")}


def test_a_read_that_fails_raises_for_who_waits_and_is_tried_again() -> None:
    rig = rig_of(failures={2: [True, False]})

    async def work() -> None:
        with pytest.raises(InjectedError):
            await lease_host(rig, 2)
        lease = await lease_host(rig, 2)
        rig.core.release(lease, None)

    run(rig.loop, work())
    assert [block for _, block in rig.logged("read")] == [2, 2]


def test_a_read_ahead_that_fails_is_met_again_by_who_needs_it() -> None:
    rig = rig_of(on_cpu=(2,), failures={2: [True, False]})

    async def work() -> None:
        await asyncio.sleep(50)
        lease = await lease_host(rig, 2)
        rig.core.release(lease, None)

    run(rig.loop, work())
    assert [block for _, block in rig.logged("read")] == [2, 2]


def test_an_interrupted_wait_leaves_no_lease() -> None:
    rig = rig_of()

    async def work() -> None:
        before, after = rig.core.acquire_host_nowait(0), rig.core.acquire_host_nowait(1)
        assert not isinstance(before, Lease)
        assert not isinstance(after, Lease)
        rig.core.forget(before)  # nobody waits any more
        await asyncio.sleep(50)
        rig.core.forget(after)  # it was granted meanwhile
        assert rig.core.back is not None
        assert {held.leases for held in rig.core.back.holding.values()} == {0}

    run(rig.loop, work())


def test_closing_tells_who_waits() -> None:
    rig = rig_of()

    async def work() -> None:
        waiting = asyncio.ensure_future(lease_host(rig, 3))
        await asyncio.sleep(3)
        assert "block 3 in the host" in rig.core.report()
        await rig.core.stop(ClosedError("closed"))
        with pytest.raises(ClosedError):
            await waiting
        with pytest.raises(ClosedError):
            rig.core.acquire_host_nowait(0)

    run(rig.loop, work())


def test_what_the_cpu_computes_is_not_exchanged_for_what_the_device_repeats() -> None:
    """Decoding uses 4 and 5 on the device, over and over; 0 and 1 are idle there, and not `droppable` in the host."""
    rig = rig_of(droppable=(2, 3, 4, 5), on_cpu=(0, 1))

    async def work() -> None:
        for _ in range(6):
            for block in (0, 1):
                rig.core.release(await lease_host(rig, block), None)
            await rig.call([4, 5], 3)

    run(rig.loop, work())
    assert rig.core.back is not None
    assert sorted(rig.core.back.permanent) == [0, 1, 4, 5]
    assert [block for _, block in rig.logged("read")].count(0) == 1
