"""Experts in host memory below a device: what is kept has a slot of its own, and gives it back when nobody uses it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.arena import PAGE, AnyArena
from penstock.scheduler.experts.cache import CacheSetting
from penstock.scheduler.experts.events import Event, event_of
from penstock.scheduler.experts.policies import policy
from penstock.scheduler.experts.shape import Routing
from penstock.scheduler.experts.shelf import HostShelf

ROUTING = Routing(layers=2, experts=5, top_k=2)
PARTS = 2
BLOCKS = [np.arange(10, dtype=np.int64).reshape(2, 5) + 10 * part for part in range(PARTS)]


class Host:
    """What lies in host memory, and what of it is in use."""

    def __init__(self) -> None:
        self.there: set[int] = set()
        self.busy: set[int] = set()

    def let_go(self, blocks: Sequence[int]) -> list[int]:
        free = [block for block in blocks if block not in self.busy]
        self.there -= set(free)
        return free


def make(capacity: int) -> tuple[HostShelf, Host]:
    host = Host()
    arena = AnyArena(tier="host", nbytes=PAGE * max(capacity, 1) * PARTS)
    ranks = policy("lru", ROUTING)
    shelf = HostShelf(
        routing=ROUTING,
        setting=CacheSetting(capacity=capacity),
        policy=ranks,
        blocks=BLOCKS,
        slots=[[arena.cut(PAGE) for _ in range(capacity)] for _ in range(PARTS)],
        let_go=host.let_go,
    )
    shelf.seen = ranks.seen  # type: ignore[attr-defined]
    return shelf, host


def event(step: int, layer: int, experts: Sequence[int]) -> Event:
    chosen = np.array([[expert] for expert in experts])
    return event_of(step=step, layer=layer, phase="decode", experts=5, chosen=chosen)


def read(shelf: HostShelf, host: Host, each: Event) -> list[int]:
    """What a layer reads that is to stay; the blocks."""
    shelf.seen(each)  # type: ignore[attr-defined]
    shelf.cache.seen(each)
    places = shelf.take(each, [e for e in each.experts.tolist() if not shelf.held[each.layer, e]])
    host.there |= {block for block, _ in places}
    return [block for block, _ in places]


def test_what_is_kept_has_a_slot_for_each_part_and_replaces_what_was_used_longest_ago() -> None:
    shelf, host = make(2)
    assert read(shelf, host, event(0, 0, [1])) == [1, 11]
    assert read(shelf, host, event(0, 1, [3])) == [8, 18]
    assert read(shelf, host, event(1, 0, [1])) == []  # it is there
    assert read(shelf, host, event(2, 0, [4])) == [4, 14]
    assert host.there == {4, 14, 8, 18}


def test_while_a_copy_of_what_leaves_is_under_way_the_next_one_passes_through() -> None:
    shelf, host = make(2)
    read(shelf, host, event(0, 0, [1]))
    read(shelf, host, event(0, 1, [3]))
    host.busy = {1}
    assert read(shelf, host, event(1, 0, [2])) == []
    assert not shelf.held[0].any()
    assert read(shelf, host, event(2, 0, [1])) == []  # the copy that leaves is in its own way
    host.busy = set()
    assert read(shelf, host, event(3, 0, [2])) == [2, 12]


def test_what_could_not_be_read_is_not_held() -> None:
    shelf, host = make(4)
    read(shelf, host, event(0, 0, [1, 2]))
    shelf.refused(0, [1])
    assert shelf.held[0].nonzero()[0].tolist() == [2]
    assert read(shelf, host, event(1, 0, [1])) == [1, 11]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 1),
            st.sets(st.integers(0, 4), min_size=1, max_size=3),
            st.sets(st.integers(0, 19), max_size=4),
        ),
        max_size=40,
    ),
    st.integers(0, 6),
)
def test_no_slot_is_given_twice_or_lost(steps: list[tuple[int, set[int], set[int]]], capacity: int) -> None:
    shelf, host = make(capacity)
    for number, (layer, experts, busy) in enumerate(steps):
        host.busy = busy & host.there
        read(shelf, host, event(number, layer, sorted(experts)))
        slots = [(part, slot.offset) for part, slot in [*shelf._lying.values(), *shelf._leaving.values()]]
        free = [(part, slot.offset) for part, each in enumerate(shelf._free) for slot in each]
        assert len(set(slots + free)) == len(slots) + len(free) == PARTS * capacity
        held = {int(numbers[place]) for place in zip(*shelf.held.nonzero(), strict=True) for numbers in BLOCKS}
        assert held == shelf._lying.keys() <= host.there
        assert not shelf._lying.keys() & shelf._leaving.keys()
