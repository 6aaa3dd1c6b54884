"""Blocks in slots of somebody else's: what no order foretells. On the mock clock: a read takes 10 ticks, a copy 4."""

import asyncio
import random

import pytest
from mockclock import InjectedError, Rig, make_rig, run

from penstock.memory.arena import PAGE, AnyArena, Slot
from penstock.memory.errors import ClosedError, PenstockError

FAIL = True


def own_slots(count: int) -> list[Slot]:
    arena = AnyArena(tier="own", nbytes=PAGE * count)
    return [arena.cut(PAGE) for _ in range(count)]


async def use(rig: Rig, block: int, ticks: int = 3, *, tail: int = 0) -> None:
    lease = await rig.acquire(block, observed=False)
    await asyncio.sleep(ticks)
    rig.release(lease, tail=tail)


def test_they_overtake_what_is_prefetched_and_teach_no_order() -> None:
    rig = make_rig(blocks=6, ring=2, order=(0, 1))
    first, second = own_slots(2)

    async def work() -> None:
        rig.core.bring([(4, first), (5, second)])
        rig.core.begin("root")
        await rig.use(0, 3)
        await use(rig, 4)
        await use(rig, 5)
        await rig.use(1, 3)
        rig.core.end(failed=False)

    run(rig.loop, work())
    assert [block for _, block in rig.logged("read")[:4]] == [0, 4, 5, 1]  # the drive is at 0 already
    statistics = rig.core.statistics()
    assert (statistics.orders.matched, statistics.orders.mismatched) == (2, 0)
    assert rig.core.front.in_ring() == {0, 1}


def test_they_stay_until_they_are_forgotten_and_the_slot_is_refilled_after_its_last_use() -> None:
    rig = make_rig(blocks=6, ring=1, order=(0,))
    (slot,) = own_slots(1)

    async def work() -> None:
        rig.core.bring([(4, slot)])
        await use(rig, 4, tail=20)
        await use(rig, 4, tail=20)
        rig.core.bring([(5, slot)], gone=[4])  # FakeMover fails the test if it is refilled while it is in use
        await use(rig, 5)

    run(rig.loop, work())
    assert [block for _, block in rig.logged("read") if block >= 4] == [4, 5]
    assert 4 not in rig.core.front.holding


def test_a_failure_that_nobody_waited_for_is_told_to_who_asks_and_the_block_can_be_brought_again() -> None:
    rig = make_rig(blocks=6, ring=1, order=(0,), failures={4: [FAIL]})
    (slot,) = own_slots(1)

    async def work() -> None:
        rig.core.bring([(4, slot)])
        await asyncio.sleep(50)
        with pytest.raises(InjectedError):
            await use(rig, 4)
        assert 4 not in rig.core.front.holding
        rig.core.bring([(4, slot)], gone=[4])  # what is gone already is passed over
        await use(rig, 4)

    run(rig.loop, work())


def test_a_failure_is_told_to_who_waits() -> None:
    rig = make_rig(blocks=6, ring=1, order=(0,), failures={4: [FAIL]})
    (slot,) = own_slots(1)

    async def work() -> None:
        rig.core.bring([(4, slot)])
        with pytest.raises(InjectedError):
            await use(rig, 4)
        assert 4 not in rig.core.front.holding

    run(rig.loop, work())


def test_a_failed_one_can_be_forgotten_unasked() -> None:
    rig = make_rig(blocks=6, ring=1, order=(0,), failures={4: [FAIL]})
    (slot,) = own_slots(1)

    async def work() -> None:
        rig.core.bring([(4, slot)])
        await asyncio.sleep(50)
        rig.core.bring([(5, slot)], gone=[4])
        await use(rig, 5)

    run(rig.loop, work())


def test_they_pass_through_the_host_to_a_device_apart() -> None:
    rig = make_rig(blocks=6, ring=2, back_ring=2, order=(0, 1))
    first, second = own_slots(2)

    async def work() -> None:
        rig.core.bring([(4, first), (5, second)])
        await use(rig, 4)
        await use(rig, 5)
        await rig.call([0, 1], 3)

    run(rig.loop, work())
    assert [block for _, block in rig.logged("copy")[:4]] == [0, 1, 4, 5]  # both host slots were taken already


def test_one_that_was_forgotten_is_refused_and_takes_no_slot_of_the_ring() -> None:
    rig = make_rig(blocks=6, ring=1, order=(0,), unordered=2)
    (slot,) = own_slots(1)

    async def work() -> None:
        with pytest.raises(PenstockError, match=r"block 4 .* no slot"):  # it was never brought
            await use(rig, 4)
        rig.core.bring([(4, slot)])
        await use(rig, 4)
        rig.core.bring([], gone=[4])
        with pytest.raises(PenstockError, match=r"block 4 .* no slot"):
            await use(rig, 4)
        await rig.call([0], 3)  # others go on as ever

    run(rig.loop, work())
    assert [block for _, block in rig.logged("read")] == [0, 4]
    assert rig.core.front.holding.keys() == {0}


def test_nothing_is_brought_after_the_end() -> None:
    rig = make_rig(blocks=6, ring=1, order=(0,))
    (slot,) = own_slots(1)

    async def work() -> None:
        await rig.core.stop(ClosedError("the model was closed"))
        with pytest.raises(ClosedError):
            rig.core.bring([(4, slot)])

    run(rig.loop, work())


@pytest.mark.parametrize("seed", range(20))
def test_no_use_ever_sees_another_blocks_bytes(seed: int) -> None:
    """Random calls of ordered blocks with guests in between; `Rig` checks the slot's contents at every lease."""
    draw = random.Random(seed)
    separate = draw.random() < 0.5
    rig = make_rig(blocks=12, ring=2, order=(0, 1, 2), back_ring=3 if separate else None)
    slots, lying = own_slots(3), {}

    async def work() -> None:
        for _ in range(30):
            rig.core.begin("root")
            for block in (0, 1, 2):
                await rig.use(block, draw.randrange(5), tail=draw.randrange(8))
                wanted = draw.sample(range(3, 12), draw.randrange(1, 4))
                gone = [other for other in lying if other not in wanted]
                free = [slot for slot in slots if slot not in [lying[b] for b in lying if b in wanted]]
                new = [other for other in wanted if other not in lying]
                places = list(zip(new, free, strict=False))
                for other in gone:
                    del lying[other]
                lying.update(places)
                rig.core.bring(places, gone=gone)
                for other in wanted:
                    await use(rig, other, draw.randrange(4), tail=draw.randrange(6))
            rig.core.end(failed=False)

    run(rig.loop, work())
    assert rig.core.statistics().orders.mismatched == 0


def test_a_host_guest_that_fails_before_it_is_copied_is_told_to_who_asks() -> None:
    """Its read failed while nothing was there to take it to the device: whoever asks later must not wait for ever."""
    rig = make_rig(blocks=6, ring=1, back_ring=1, order=(0,), failures={4: [FAIL]})
    (on_device,) = own_slots(1)
    (on_host,) = own_slots(1)

    async def work() -> None:
        rig.core.bring([], kept=[(4, on_host)])
        await asyncio.sleep(50)
        rig.core.bring([(4, on_device)])
        with pytest.raises(InjectedError):
            await use(rig, 4)
        assert 4 not in rig.core.front.holding
        assert rig.core.back is not None
        assert 4 not in rig.core.back.holding
        rig.core.bring([(4, on_device)], kept=[(4, on_host)])
        await use(rig, 4)

    run(rig.loop, work())
