"""Arrivals of a known order against the executor's own rule, taken one use at a time."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.scheduler.prefetch import next_fetch
from penstock.scheduler.ringorder import Arrival, arrivals


def by_the_executor(
    order: list[list[int]], slots: int, changes: Mapping[int, Collection[int]] | None = None
) -> list[int]:
    """Blocks in the order in which a ring gets them that has time to fill up before each use."""
    ring: list[int] = []
    brought: list[int] = []

    def fill(use: int) -> None:
        while True:
            upcoming = list(chain(*order[use:]))
            fetch = next_fetch(upcoming, present=ring, evictable=set(ring), free_slots=slots - len(ring))
            if fetch is None:
                return
            if fetch.victim is not None:
                ring.remove(fetch.victim)
            ring.append(fetch.block)
            brought.append(fetch.block)

    for use, blocks in enumerate(order):
        fill(use)
        assert set(blocks) <= set(ring)
        changed = (changes or {}).get(use, ())
        if changed:
            fill(use + 1)
            ring = [block for block in ring if block not in changed]
    return brought


@given(st.integers(1, 12), st.integers(2, 6), st.integers(1, 3))
def test_a_forward_and_its_backward_are_brought_as_the_executor_brings_them(count: int, slots: int, times: int) -> None:
    order = [[block] for block in [*range(count), *reversed(range(count))] * times]
    found = [each.block for each in arrivals(order, slots)]
    assert found == by_the_executor(order, slots)


@given(st.integers(1, 12), st.integers(2, 6), st.integers(1, 3), st.booleans())
def test_what_changes_between_two_steps_is_brought_anew(count: int, slots: int, times: int, looked_up: bool) -> None:
    """A block 0 that is looked up is used in forward alone."""
    step = [[block] for block in [*([0] if looked_up else []), *range(1, count + 1), *range(count, 0, -1)]]
    order = step * times
    changes = {turn * len(step) - 1: range(count + 1) for turn in range(1, times + 1)}
    found = arrivals(order, slots, changes=changes)
    assert [each.block for each in found] == by_the_executor(order, slots, changes)
    # read ahead of the next step, to be changed before it: what backward does not ask for
    assert {each.block for each in found if each.in_vain} <= {0}


def test_what_is_read_ahead_and_then_changes_is_read_in_vain() -> None:
    order = [[block] for block in (0, 1, 2, 2, 1, 0, 1, 2)]
    found = arrivals(order, 2, changes={4: (0, 1, 2)})
    assert [(each.block, each.use, each.after) for each in found] == [
        (0, 0, None), (1, 1, None), (2, 2, 0), (0, 4, 3), (0, 5, 4), (1, 6, 4), (2, 7, 5)
    ]  # fmt: skip
    assert [each.in_vain for each in found] == [False, False, False, True, False, False, False]


def test_where_a_ring_turns_round_nothing_is_brought_twice() -> None:
    order = [[block] for block in (1, 2, 3, 4, 5, 5, 4, 3, 2, 1)]
    found = arrivals(order, 3)
    assert [each.block for each in found] == [1, 2, 3, 4, 5, 2, 1]
    assert found[3] == Arrival(block=4, use=3, after=0, instead_of=1)
    # going back 5 and 4 are done with first, and make room for 2 and 1
    assert [(each.use, each.after) for each in found[5:]] == [(8, 5), (9, 6)]


def test_a_use_may_have_several_blocks_and_one_that_changed_is_another() -> None:
    order = [[(1, 0), (2, 0)], [(2, 0)], [(1, 1), (2, 1)]]
    found = arrivals(order, 3)
    assert [each.block for each in found] == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert [each.after for each in found] == [None, None, None, 0]


@given(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=2, unique=True), max_size=40), st.integers(3, 6))
def test_every_use_finds_its_blocks_and_no_slot_is_taken_from_who_needs_it(order: list[list[int]], slots: int) -> None:
    coming = {use: [each for each in arrivals(order, slots) if each.use == use] for use in range(len(order))}
    ring: dict[Hashable, int] = {}
    """By block: its last use."""
    for use, blocks in enumerate(order):
        for each in coming[use]:
            assert each.block not in ring
            if each.instead_of is not None:
                assert each.instead_of not in blocks
                assert ring.pop(each.instead_of) == each.after
            ring[each.block] = use
            assert len(ring) <= slots
        assert set(blocks) <= ring.keys()
        ring.update(dict.fromkeys(blocks, use))


def test_a_ring_has_more_slots_than_a_use_has_blocks() -> None:
    with pytest.raises(AssertionError):
        arrivals([[1, 2]], 2)
