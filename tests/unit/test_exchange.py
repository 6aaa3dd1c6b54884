"""Which blocks stay once an order repeats: the policy against brute force, the core on a mock clock."""

import asyncio
from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st
from mockclock import Rig, make_rig, run

from penstock.scheduler.exchange import Exchange, exchanges

ENCODER, FIRST, DECODER = (0, 1, 2, 3), (4, 5, 6, 7), (4, 6, 7)
"""The first call of the decoder uses a block that later ones do not."""


def most_nbytes_kept(wanted: list[int], free: list[int]) -> int:
    """The most bytes that blocks of the sizes `wanted` can fill in slots of the sizes `free`, one block per slot."""
    few, many = sorted((wanted, free), key=len)
    fits = (lambda a, b: a <= b) if few is wanted else (lambda a, b: b <= a)
    best = 0
    for chosen in permutations(many, len(few)):
        pairs = [(a, b) for a, b in zip(few, chosen, strict=True) if fits(a, b)]
        best = max(best, sum(min(pair) if few is wanted else pair[1] for pair in pairs))
    return best


@settings(max_examples=300)
@given(
    order=st.lists(st.integers(0, 9), max_size=8),
    sizes=st.lists(st.integers(1, 6), min_size=10, max_size=10),
    kept=st.dictionaries(st.integers(0, 9), st.integers(0, 2), max_size=5),
    data=st.data(),
)
def test_exchanges_keep_the_most_bytes(
    order: list[int], sizes: list[int], kept: dict[int, int], data: st.DataObject
) -> None:
    slots = {block: sizes[block] + more for block, more in kept.items()}
    idle = data.draw(st.sets(st.sampled_from(sorted(slots)))) if slots else set()
    found = exchanges(order, slots=slots, idle=idle, sizes=dict(enumerate(sizes)))
    leaving, coming = [e.leaves for e in found], [e.comes for e in found]
    assert len(set(leaving)) == len(leaving)
    assert len(set(coming)) == len(coming)
    assert set(leaving) <= idle - set(order)
    assert set(coming) <= set(order) - slots.keys()
    assert all(sizes[e.comes] <= slots[e.leaves] for e in found)
    wanted = [sizes[block] for block in set(order) - slots.keys()]
    free = [slots[block] for block in idle - set(order)]
    assert sum(sizes[block] for block in coming) == most_nbytes_kept(wanted, free)


def test_those_that_come_are_spread_over_the_order() -> None:
    slots = {100: 8, 101: 8}
    found = exchanges(range(8), slots=slots, idle={100, 101}, sizes=dict.fromkeys([*range(8), 100, 101], 8))
    assert found == [Exchange(leaves=100, comes=0), Exchange(leaves=101, comes=4)]


async def answer(rig: Rig, tokens: int) -> None:
    """One run of an encoder, then of a decoder, token by token."""
    await rig.call(ENCODER, 5, root="encoder")
    await rig.call(FIRST, 5, root="decoder")
    for _ in range(tokens - 1):
        await rig.call(DECODER, 5, root="decoder")


def test_idle_blocks_make_room_once_the_decoder_repeats() -> None:
    rig = make_rig(blocks=8, ring=2, permanent=(0, 2, 4), droppable=tuple(range(8)))
    marks: list[int] = []

    async def work() -> None:
        await answer(rig, 5)
        marks.append(len(rig.logged("read")))
        await rig.call(DECODER, 5, root="decoder")
        await asyncio.sleep(100)
        marks.append(len(rig.logged("read")))

    run(rig.loop, work())
    assert sorted(rig.core.front.permanent) == [4, 6, 7]
    assert marks[0] == marks[1], "the decoder fits: nothing is read any more"
    assert rig.core.statistics().exchanged == 2
    assert [r.kind for r in rig.core.timeline.records()].count("exchange") == 2


def test_the_next_answer_streams_what_left() -> None:
    rig = make_rig(blocks=8, ring=2, permanent=(0, 2, 4), droppable=tuple(range(8)))

    async def work() -> None:
        await answer(rig, 5)
        await answer(rig, 5)

    run(rig.loop, work())
    assert sorted(rig.core.front.permanent) == [4, 6, 7]
    assert rig.core.statistics().exchanged == 2, "the same order repeats: nothing to choose anew"
    assert rig.core.statistics().acquires == 2 * (4 + 4 + 4 * 3)


def test_blocks_that_have_no_copy_on_disk_stay() -> None:
    rig = make_rig(blocks=8, ring=2, permanent=(0, 2, 4), droppable=(2,))
    run(rig.loop, answer(rig, 5))
    assert sorted(rig.core.front.permanent) == [0, 4, 6]


def test_a_leased_block_stays() -> None:
    rig = make_rig(blocks=8, ring=2, permanent=(0, 2, 4), droppable=tuple(range(8)))

    async def work() -> None:
        lease = await rig.acquire(0, observed=False)
        await answer(rig, 5)
        rig.release(lease)

    run(rig.loop, work())
    assert sorted(rig.core.front.permanent) == [0, 4, 6]


def test_both_tiers_make_room() -> None:
    """Device: 0 and 4 stay, host: 2 and 6. The decoder uses 4, 6 and 7."""
    rig = make_rig(
        blocks=8, ring=2, permanent=(0, 4), back_ring=2, back_permanent=(2, 6), droppable=tuple(range(8)), copy_ticks=4
    )

    async def work() -> None:
        await answer(rig, 8)
        before = len(rig.logged("read"))
        await rig.call(DECODER, 5, root="decoder")
        await asyncio.sleep(100)
        assert len(rig.logged("read")) == before

    run(rig.loop, work())
    assert rig.core.back is not None
    assert sorted(rig.core.front.permanent) == [4, 6]
    assert sorted(rig.core.back.permanent) == [6, 7]


def test_a_sweep_that_uses_everything_changes_nothing() -> None:
    rig = make_rig(blocks=4, ring=2, permanent=(1, 3), droppable=tuple(range(4)))

    async def work() -> None:
        for _ in range(4):
            await rig.call(range(4), 3)

    run(rig.loop, work())
    assert sorted(rig.core.front.permanent) == [1, 3]
    assert rig.core.statistics().exchanged == 0
