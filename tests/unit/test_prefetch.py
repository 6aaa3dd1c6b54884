"""Which block comes next and which goes for it, against brute force."""

from functools import cache
from itertools import chain, islice, repeat

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.scheduler.prefetch import Fetch, first_unloaded, next_fetch, victim_for_demand


def test_free_slots_are_filled_in_order() -> None:
    assert next_fetch([0, 1, 2], present=[], evictable=set(), free_slots=1) == Fetch(block=0, victim=None)
    assert next_fetch([0, 1, 2], present=[0, 1], evictable=set(), free_slots=1) == Fetch(block=2, victim=None)
    assert next_fetch([0, 1, 0, 1], present=[0, 1], evictable={0}, free_slots=1) is None
    assert next_fetch([], present=[0, 1], evictable={0}, free_slots=1) is None


def test_the_block_just_used_goes_first() -> None:
    # 0 was used; its turn comes last
    assert next_fetch([1, 2, 3, 0], present=[0, 1, 2], evictable={0, 1, 2}, free_slots=0) == Fetch(block=3, victim=0)


def test_nothing_is_brought_that_is_used_later_than_all_it_could_replace() -> None:
    assert next_fetch([1, 2, 3, 0], present=[1, 2], evictable={1, 2}, free_slots=0) is None
    assert next_fetch([1, 2, 3, 0], present=[1, 2], evictable=set(), free_slots=0) is None


def test_a_block_never_used_again_goes_before_all_others() -> None:
    assert next_fetch([1, 4, 0], present=[0, 1, 9], evictable={0, 9}, free_slots=0) == Fetch(block=4, victim=9)


def test_demand_takes_the_block_used_last() -> None:
    assert victim_for_demand([1, 0, 2], evictable={0, 1, 2}) == 2
    assert victim_for_demand([1, 0], evictable={0, 1, 2}) == 2
    assert victim_for_demand([], evictable={3, 2}) == 2
    assert victim_for_demand([1, 0], evictable=set()) is None
    assert victim_for_demand([1], evictable={1}) == 1


def test_the_next_permanent_block() -> None:
    assert first_unloaded([3, 1, 2], {1, 2}) == 1
    assert first_unloaded([3], {1, 2}) is None


def distance(upcoming: list[int], block: int) -> int:
    return upcoming.index(block) if block in upcoming else len(upcoming)


@given(
    upcoming=st.lists(st.integers(0, 7), max_size=20),
    present=st.sets(st.integers(0, 7), max_size=5),
    free=st.integers(0, 2),
    data=st.data(),
)
def test_every_decision_is_beladys(upcoming: list[int], present: set[int], free: int, data: st.DataObject) -> None:
    evictable = data.draw(st.sets(st.sampled_from(sorted(present)))) if present else set()
    found = next_fetch(upcoming, present=present, evictable=evictable, free_slots=free)
    missing = [block for block in upcoming if block not in present]
    farthest = max((distance(upcoming, block) for block in evictable), default=-1)
    if not missing or (not free and farthest < distance(upcoming, missing[0])):
        assert found is None
        return
    assert found is not None
    assert found.block == missing[0]
    if free:
        assert found.victim is None
    else:
        assert found.victim in evictable
        assert distance(upcoming, found.victim) == farthest
    if evictable:
        victim = victim_for_demand(upcoming, evictable=evictable)
        assert victim is not None
        assert distance(upcoming, victim) == farthest


def demand_misses(order: tuple[int, ...], slots: int) -> int:
    held: set[int] = set()
    misses = 0
    for at, block in enumerate(order):
        if block in held:
            continue
        misses += 1
        if len(held) == slots:
            victim = victim_for_demand(order[at:], evictable=held)
            assert victim is not None
            held.discard(victim)
        held.add(block)
    return misses


def fewest_misses(order: tuple[int, ...], slots: int) -> int:
    @cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(order):
            return 0
        block = order[at]
        if block in held:
            return best(at + 1, held)
        choices = [held] if len(held) < slots else [held - {victim} for victim in held]
        return 1 + min(best(at + 1, choice | {block}) for choice in choices)

    return best(0, frozenset())


@settings(max_examples=150)
@given(cycle=st.lists(st.integers(0, 5), min_size=1, max_size=7), rounds=st.integers(1, 3), slots=st.integers(1, 4))
def test_demand_alone_misses_no_more_than_the_best_possible(cycle: list[int], rounds: int, slots: int) -> None:
    order = tuple(cycle * rounds)
    assert demand_misses(order, slots) == fewest_misses(order, slots)


def prefetched_misses(order: tuple[int, ...], slots: int, future: int) -> int:
    """Accesses that find their block absent, when one block can be brought during each access."""
    endless = chain.from_iterable(repeat(order))
    trace = list(islice(endless, len(order) * 3 + future))
    held: set[int] = set()
    misses = 0
    for at in range(len(order) * 3):
        block, upcoming = trace[at], trace[at + 1 : at + future]
        if block not in held:
            misses += 1
            if len(held) == slots:
                victim = victim_for_demand([block, *upcoming], evictable=held)
                assert victim is not None
                held.discard(victim)
            held.add(block)
        fetch = next_fetch(upcoming, present=held, evictable=held - {block}, free_slots=slots - len(held))
        if fetch is not None:
            assert (fetch.victim is None) == (len(held) < slots)
            held.discard(-1 if fetch.victim is None else fetch.victim)
            held.add(fetch.block)
    return misses


def fewest_prefetched_misses(order: tuple[int, ...], slots: int) -> int:
    trace = order * 3

    @cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(trace):
            return 0
        block = trace[at]
        if block in held:
            return during(at, held)
        choices = [held] if len(held) < slots else [held - {victim} for victim in held]
        return 1 + min(during(at, choice | {block}) for choice in choices)

    @cache
    def during(at: int, held: frozenset[int]) -> int:
        found = best(at + 1, held)
        for new in set(order) - held:
            choices = [held] if len(held) < slots else [held - {victim} for victim in held if victim != trace[at]]
            for choice in choices:
                found = min(found, best(at + 1, choice | {new}))
        return found

    return best(0, frozenset())


@settings(max_examples=60)
@given(order=st.permutations(range(5)), length=st.integers(1, 5), slots=st.integers(2, 4))
def test_prefetching_a_cycle_misses_only_while_the_ring_warms_up(order: list[int], length: int, slots: int) -> None:
    cycle = tuple(order[:length])
    assert prefetched_misses(cycle, slots, 4 * length) <= fewest_prefetched_misses(cycle, slots) + slots
    assert prefetched_misses(cycle, slots, 4 * length) == 1  # the very first access
