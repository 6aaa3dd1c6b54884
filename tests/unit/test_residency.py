"""What stays resident: never beyond the budget, as much as fits, spread over the order."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.scheduler.residency import Sized, choose_residency, interleave, smallest_budget


def sized(sizes: list[int]) -> list[Sized]:
    return [Sized(id=number, nbytes=nbytes, cost_nbytes=nbytes) for number, nbytes in enumerate(sizes)]


def test_everything_fits() -> None:
    found = choose_residency(sized([4, 4, 4]), 12, min_slots=2, depth_nbytes=8)
    assert found is not None
    assert found.resident == {0, 1, 2}
    assert (found.slots, found.nbytes, found.streamed_nbytes) == (0, 12, 0)


def test_everything_fits_but_others_pass_through() -> None:
    found = choose_residency(sized([4, 4, 4]), 22, min_slots=2, depth_nbytes=8, transit_nbytes=5)
    assert found is not None
    assert (found.slots, found.slot_nbytes, found.nbytes) == (2, 5, 22)
    assert choose_residency(sized([4, 4, 4]), 21, min_slots=2, depth_nbytes=8, transit_nbytes=5) != found


def test_half_of_the_blocks_alternate() -> None:
    found = choose_residency(sized([1] * 16), 10, min_slots=2, depth_nbytes=1)
    assert found is not None
    assert found.slots == 2
    assert len(found.resident) == 8
    kept = sorted(found.resident)
    assert {after - before for before, after in itertools.pairwise(kept)} == {2}
    assert found.streamed_nbytes == 8


@pytest.mark.parametrize("factor", [0.45, 2])
def test_blocks_that_are_converted_on_the_way_alternate_too(factor: float) -> None:
    """float32 files computed with in bfloat16 move twice a block's size, the other way round half of it."""
    blocks = [Sized(id=number, nbytes=100, cost_nbytes=100 * (factor + number % 3 / 10)) for number in range(16)]
    found = choose_residency(blocks, 1000, min_slots=2, depth_nbytes=100)
    assert found is not None
    kept = sorted(found.resident)
    assert {after - before for before, after in itertools.pairwise(kept)} == {2}


def test_what_is_used_often_stays_before_what_is_used_once_and_that_before_what_is_used_seldom() -> None:
    uses = [0.25, 1, 2, 0.25, 1, 2]
    blocks = [Sized(id=number, nbytes=4, cost_nbytes=4 * times, uses=times) for number, times in enumerate(uses)]
    kept = [choose_residency(blocks, 8 + 4 * room, min_slots=2, depth_nbytes=4) for room in range(4)]
    assert [found.resident for found in kept if found] == [set(), {2}, {2, 5}, {1, 2, 5}]


def test_a_block_larger_than_the_slots_is_resident() -> None:
    found = choose_residency(sized([100, 4, 4, 4, 4]), 112, min_slots=2, depth_nbytes=4)
    assert found is not None
    assert 0 in found.resident
    assert found.slot_nbytes == 4


def test_the_cheapest_split_wins_over_large_slots() -> None:
    # two slots of 100 would leave room for nothing else; keeping the large block leaves two slots of 4
    assert smallest_budget(sized([100, 4, 4, 4]), min_slots=2) == 108
    assert choose_residency(sized([100, 4, 4, 4]), 107, min_slots=2, depth_nbytes=4) is None


SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=20)


@settings(max_examples=300)
@given(
    sizes=SIZES,
    budget=st.integers(0, 800),
    slots=st.integers(1, 4),
    depth=st.integers(0, 200),
    transit=st.integers(0, 60),
)
def test_never_beyond_the_budget(sizes: list[int], budget: int, slots: int, depth: int, transit: int) -> None:
    blocks = sized(sizes)
    found = choose_residency(blocks, budget, min_slots=slots, depth_nbytes=depth, transit_nbytes=transit)
    assert (found is not None) == (budget >= smallest_budget(blocks, min_slots=slots, transit_nbytes=transit))
    if found is None:
        return
    resident = sum(block.nbytes for block in blocks if block.id in found.resident)
    streamed = [block for block in blocks if block.id not in found.resident]
    assert found.resident_nbytes == resident
    assert found.nbytes == resident + found.slots * found.slot_nbytes <= budget
    assert found.streamed_nbytes == sum(block.cost_nbytes for block in streamed)
    if streamed or transit:
        assert found.slots >= slots
        assert found.slot_nbytes >= max([transit, *(block.nbytes for block in streamed)])


@settings(max_examples=100)
@given(sizes=SIZES, slots=st.integers(1, 4), transit=st.integers(0, 60))
def test_the_smallest_budget_is_exactly_the_threshold(sizes: list[int], slots: int, transit: int) -> None:
    blocks = sized(sizes)
    least = smallest_budget(blocks, min_slots=slots, transit_nbytes=transit)
    for depth in (0, 1000):
        options = {"min_slots": slots, "depth_nbytes": depth, "transit_nbytes": transit}
        assert choose_residency(blocks, least, **options) is not None
        assert choose_residency(blocks, least - 1, **options) is None


@given(sizes=SIZES, budget=st.integers(-10, 800))
def test_interleaving_stays_within_the_budget_and_leaves_no_room(sizes: list[int], budget: int) -> None:
    blocks = sized(sizes)
    kept = interleave(blocks, budget)
    used = sum(block.nbytes for block in blocks if block.id in kept)
    assert used <= max(budget, 0)
    left = [block.nbytes for block in blocks if block.id not in kept]
    assert not left or min(left) > budget - used or budget <= 0


@given(count=st.integers(1, 200), share=st.floats(0.01, 0.99))
def test_equal_blocks_are_spread_evenly(count: int, share: float) -> None:
    budget = int(count * share)
    kept = sorted(interleave(sized([1] * count), budget))
    assert len(kept) == budget
    if not budget:
        return
    gaps = [after - before for before, after in zip([-1, *kept], [*kept, count], strict=True)]
    assert max(gaps) <= count / budget + 2


@given(sizes=SIZES, share=st.floats(0.1, 0.9))
def test_every_stretch_of_the_order_keeps_its_share(sizes: list[int], share: float) -> None:
    blocks = sized(sizes)
    budget = int(sum(sizes) * share)
    kept = interleave(blocks, budget)
    owed = had = 0.0
    for block in blocks:
        owed += block.nbytes * budget / sum(sizes)
        had += block.nbytes * (block.id in kept)
        assert had <= owed + budget - sum(b.nbytes for b in blocks if b.id in kept) + 2 * max(sizes) + 1
