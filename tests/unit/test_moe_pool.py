"""The slots of experts: what is read when, and that nobody ever computes with another expert's bytes.

The carrier is a slow, obvious one: it remembers what each slot was filled with last, and checks it at every lease.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.arena import PAGE, AnyArena, Slot
from penstock.memory.errors import DiskError, PenstockError, StallError
from penstock.scheduler.experts.cache import ADMISSIONS, CacheSetting, ExpertCache
from penstock.scheduler.experts.events import Event, event_of
from penstock.scheduler.experts.policies import POLICIES, policy
from penstock.scheduler.experts.policies.policy import Policy
from penstock.scheduler.experts.pool import ExpertPool
from penstock.scheduler.experts.shape import Routing
from penstock.scheduler.experts.shelf import HostShelf
from penstock.scheduler.lease import Lease
from penstock.scheduler.residence import Residence

ROUTING = Routing(layers=3, experts=6, top_k=2)
PARTS = 2
_FIRST = np.arange(ROUTING.total, dtype=np.int64).reshape(ROUTING.layers, ROUTING.experts)
BLOCKS = [_FIRST + part * ROUTING.total for part in range(PARTS)]


@dataclass(eq=False)
class Shelves:
    """What each slot holds, and all that was read."""

    lying: dict[int, Slot] = field(default_factory=dict)
    filled: dict[int, int] = field(default_factory=dict)
    """By offset of a slot."""
    reads: list[int] = field(default_factory=list)
    leased: set[int] = field(default_factory=set)
    fails: set[int] = field(default_factory=set)
    stalls: bool = False
    """Whether what was brought does not arrive."""
    strict: bool = True
    """Whether it is a fault to ask for what was not brought; else it is told as an executor tells it."""

    def bring(
        self,
        places: Sequence[tuple[int, Slot]],
        gone: Sequence[int] = (),
        *,
        kept: Sequence[tuple[int, Slot]] = (),
        urgent: bool = True,
    ) -> list[int]:
        assert not kept
        for block in gone:
            assert block not in self.leased
            self.lying.pop(block, None)
        for block, slot in places:
            assert block not in self.lying
            assert slot.offset not in {other.offset for other in self.lying.values()}, "two blocks in one slot"
            self.lying[block] = slot
            self.filled[slot.offset] = block
            self.reads.append(block)
        return []

    def acquire_host(self, block: int) -> Lease:
        raise AssertionError("there is one tier")

    def acquire(self, block: int, *, observed: bool, counted: bool = True) -> Lease:
        assert not observed
        if block not in self.lying:
            if self.strict:
                pytest.fail(f"block {block} is asked for, and was not brought")
            raise PenstockError(f"block {block} has no slot")
        slot = self.lying[block]
        if self.stalls:
            raise StallError("nothing moves")
        assert self.filled[slot.offset] == block
        if block in self.fails:
            self.fails.discard(block)
            del self.lying[block]
            raise DiskError("the drive is gone")
        self.leased.add(block)
        return Lease(residence=Residence(block=block, slot=slot, permanent=False, ready=True))

    def release(self, lease: Lease, event: object) -> None:
        self.leased.remove(lease.block)


def make(
    capacity: int,
    passing: int,
    *,
    name: str = "lru",
    minimum: float = 1.0,
    admission: str = "adaptive",
    apart: bool = False,
    shelves: Shelves | None = None,
    shelf: Callable[[Policy], HostShelf] | None = None,
) -> tuple[ExpertPool, Shelves]:
    shelves = shelves or Shelves()
    count, ranks = capacity + passing, policy(name, ROUTING)
    arena = AnyArena(tier="host", nbytes=PAGE * count * PARTS)
    pool = ExpertPool(
        routing=ROUTING,
        setting=CacheSetting(capacity=capacity, minimum=minimum, admission=admission),  # type: ignore[arg-type]
        policy=ranks,
        blocks=BLOCKS,
        slots=[[arena.cut(PAGE) for _ in range(count)] for _ in range(PARTS)],
        carrier=shelves,
        expert_nbytes=100,
        apart=apart,
        shelf=None if shelf is None else shelf(ranks),
    )
    return pool, shelves


def event(layer: int, experts: Sequence[int], *, step: int = 0, prefill: bool = False) -> Event:
    chosen = np.array([[expert] for expert in experts])
    phase = "prefill" if prefill else "decode"
    return event_of(step=step, layer=layer, phase=phase, experts=ROUTING.experts, chosen=chosen)  # type: ignore[arg-type]


def compute(pool: ExpertPool, each: Event, ahead: Sequence[int] = ()) -> tuple[int, ...]:
    """Run a layer, and say in which order; `ahead` are experts to be brought for the next one."""
    with pool.layer(each) as run:
        assert sorted(run.order) == each.experts.tolist()
        if ahead:
            pool.prefetch(each.layer + 1, ahead)
        for part in range(PARTS):
            for expert in run.order:
                with run.lent(part, expert, lambda: None) as lease:
                    assert lease.block == part * ROUTING.total + each.layer * ROUTING.experts + expert
        return run.order


def test_what_is_there_is_computed_first_and_not_read() -> None:
    pool, shelves = make(6, 2)
    assert compute(pool, event(0, [4, 1])) == (1, 4)
    assert shelves.reads == [1, 4, 19, 22]  # first parts before second ones
    shelves.reads.clear()
    assert compute(pool, event(0, [2, 4])) == (4, 2)
    assert shelves.reads == [2, 20]
    done = pool.statistics().decode
    assert (done.uses, sum(done.hits.values()), dict(done.misses)["first"], done.read_nbytes) == (4, 1, 3, 300)


def test_experts_with_most_tokens_are_read_first() -> None:
    pool, _ = make(6, 2)
    assert compute(pool, event(0, [5, 3, 5, 3, 5, 0])) == (5, 3, 0)


def test_a_prompt_passes_through_few_slots_and_reads_each_part_once() -> None:
    pool, shelves = make(3, 1)
    for layer in range(ROUTING.layers):
        compute(pool, event(layer, range(6), prefill=True))
    assert len(shelves.reads) == len(set(shelves.reads)) == PARTS * ROUTING.total
    assert pool.statistics().cache.held == 3
    shelves.reads.clear()
    for layer in range(ROUTING.layers):
        compute(pool, event(layer, range(6), prefill=True, step=1))
    assert len(shelves.reads) == PARTS * (ROUTING.total - 3)  # a prompt evicts nothing


def test_without_a_cache_everything_passes() -> None:
    pool, shelves = make(0, 1)
    for step in range(3):
        compute(pool, event(1, [0, 3], step=step))
    assert len(shelves.reads) == 3 * 2 * PARTS
    assert not shelves.lying


@pytest.mark.parametrize("failing", [[7], [7 + 18], [8, 7 + 18]])
@pytest.mark.parametrize("capacity", [0, 3, 9])
def test_a_layer_that_fails_leaves_nothing_behind(capacity: int, failing: list[int]) -> None:
    pool, shelves = make(capacity, 1)
    shelves.fails |= set(failing)
    with pytest.raises(DiskError):
        compute(pool, event(1, [1, 2]))
    assert not shelves.leased
    shelves.fails.clear()
    for step in range(1, 4):
        compute(pool, event(1, [1, 2], step=step))
    assert len(shelves.lying) == PARTS * pool.statistics().cache.held


def test_what_does_not_arrive_keeps_its_slot_until_it_does() -> None:
    pool, shelves = make(4, 2)
    shelves.stalls = True
    for _ in range(2):  # the second one would look at what the first has left
        with pytest.raises(StallError):
            compute(pool, event(0, [1, 2]))
    assert len(shelves.lying) == 2 * PARTS
    shelves.stalls = False
    compute(pool, event(0, range(6), prefill=True))
    assert all(len(free) + len(shelves.lying) // PARTS == 6 for free in pool._free)


def test_what_was_brought_ahead_is_not_lost_where_waiting_for_it_is_interrupted() -> None:
    pool, shelves = make(2, 3)
    compute(pool, event(0, [1]), ahead=[4, 5])
    shelves.stalls = True
    with pytest.raises(StallError):
        compute(pool, event(2, [0]))
    shelves.stalls = False
    for step in range(1, 4):
        compute(pool, event(1, [4, 5], step=step))


def test_a_layer_that_was_left_half_way_keeps_what_had_arrived() -> None:
    pool, shelves = make(6, 1)
    with pytest.raises(KeyboardInterrupt), pool.layer(event(1, [1, 2])) as run, run.lent(0, 1, lambda: None):
        raise KeyboardInterrupt
    shelves.reads.clear()
    assert compute(pool, event(1, [1, 2], step=1)) == (1, 2)
    assert shelves.reads == []


def test_what_was_brought_ahead_is_used_or_forgotten() -> None:
    pool, shelves = make(0, 3)
    compute(pool, event(0, [4]), ahead=[1, 5, 2])
    assert shelves.reads == [4, 22, 7, 25, 11, 29]  # two of them: one expert must be able to pass beside them
    shelves.reads.clear()
    assert compute(pool, event(1, [0, 1])) == (1, 0)
    assert shelves.reads == [6, 24]
    assert not shelves.lying
    done = pool.statistics().decode
    assert (done.hits["prefetched"], done.read_nbytes) == (1, 400)


def test_what_was_brought_ahead_may_stay() -> None:
    pool, shelves = make(6, 2)
    compute(pool, event(0, [4]), ahead=[1])
    compute(pool, event(1, [1]))
    shelves.reads.clear()
    compute(pool, event(1, [1], step=1))
    assert shelves.reads == []


def test_nothing_is_brought_ahead_that_is_there_or_has_no_room() -> None:
    pool, _ = make(6, 2)
    compute(pool, event(1, [2]))
    with pool.layer(event(0, [4])):
        assert pool.prefetch(1, [2]) == []
    lone, _ = make(6, 1)
    with lone.layer(event(0, [4])):
        assert lone.prefetch(1, [2]) == []


def test_what_was_brought_ahead_and_failed_is_read_again() -> None:
    pool, shelves = make(0, 2)
    compute(pool, event(0, [4]), ahead=[1])
    shelves.fails.add(7)
    with pytest.raises(DiskError):
        compute(pool, event(1, [1]))
    assert compute(pool, event(1, [1], step=1)) == (1,)
    compute(pool, event(0, [4], step=2), ahead=[3])
    shelves.fails.add(9)
    compute(pool, event(1, [1], step=2))  # nobody needs what failed
    assert not shelves.lying


@given(
    capacity=st.integers(0, ROUTING.total),
    passing=st.integers(1, 3),
    name=st.sampled_from(sorted(POLICIES)),
    minimum=st.sampled_from([0.0, 0.5, 1.0]),
    admission=st.sampled_from(ADMISSIONS),
    steps=st.lists(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), min_size=3, max_size=3), max_size=8),
    prompts=st.sets(st.integers(0, 7)),
    guesses=st.lists(st.sets(st.integers(0, 5), max_size=4), min_size=24, max_size=24),
)
def test_it_reads_exactly_what_the_cache_by_itself_would_miss(
    capacity: int,
    passing: int,
    name: str,
    minimum: float,
    admission: str,
    steps: list[list[list[int]]],
    prompts: set[int],
    guesses: list[set[int]],
) -> None:
    """`Shelves` checks contents; here the cache alone, without slots or reads, is the reference."""
    pool, shelves = make(capacity, passing, name=name, minimum=minimum, admission=admission)
    setting = CacheSetting(capacity=capacity, minimum=minimum, admission=admission)  # type: ignore[arg-type]
    ranks = policy(name, ROUTING)
    cache = ExpertCache(ROUTING, setting, ranks)
    ahead: set[int] = set()
    for step, layers in enumerate(steps):
        for layer, experts in enumerate(layers):
            each = event(layer, experts, step=step, prefill=step in prompts)
            missed = [expert for expert in each.experts.tolist() if not cache.held[layer, expert]]
            ranks.seen(each)
            cache.seen(each)
            if step in prompts:
                cache.fill_free(layer, missed)
            else:
                cache.admit(layer, missed, needed=each.experts)
            shelves.reads.clear()
            guessed = sorted(guesses[3 * step + layer]) if layer + 1 < ROUTING.layers else []
            compute(pool, each, guessed)
            wanted = {part * ROUTING.total + layer * ROUTING.experts + e for part in range(PARTS) for e in missed}
            early = set(shelves.reads) - wanted
            assert len(shelves.reads) == len(set(shelves.reads))
            assert wanted - set(shelves.reads) <= ahead
            assert all((block % ROUTING.total) // ROUTING.experts == layer + 1 for block in early)
            assert len(early) <= PARTS * min(passing - 1, len(guessed))
            assert np.array_equal(pool.cache.held, cache.held)
            assert len(shelves.lying) == PARTS * int(cache.held.sum()) + len(early)
            ahead = early
    assert pool.statistics().cache.held <= capacity
