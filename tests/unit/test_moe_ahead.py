"""Experts brought ahead of their layer: only where the simulation gains by it, and never what is there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from test_moe_pool import ROUTING, Shelves, make

from penstock.scheduler.experts.ahead import LookAhead
from penstock.scheduler.experts.costs import ExpertCosts
from penstock.scheduler.experts.events import Event, event_of
from penstock.scheduler.experts.layerscheduler import LayerScheduler
from penstock.scheduler.experts.pool import ExpertPool
from penstock.scheduler.experts.prefetch import PAUSE
from penstock.scheduler.experts.trace import Ids

READ_S, COMPUTE_S = 2.0, 1.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def event(layer: int, experts: Sequence[int], guesses: Sequence[int] | None) -> Event:
    chosen = np.array([list(experts)])
    guessed = None if guesses is None else np.array([list(guesses)])
    return event_of(step=0, layer=layer, phase="decode", experts=ROUTING.experts, chosen=chosen, guesses=guessed)


def run(pool: ExpertPool, ahead: LookAhead, each: Event, *, together: bool = False) -> None:
    with pool.layer(each) as layer:
        ahead.begun(each, layer, together=together)
        for part in range(pool.parts):
            for expert in layer.order:
                with layer.lent(part, expert, lambda: None):
                    pass
        ahead.ended(each)


def made(between_s: float, taught: int = 8, *, together: bool = False) -> tuple[ExpertPool, Shelves, LookAhead, Clock]:
    """A pool of two slots beside the cache's none, on a machine where reading takes twice as long as computing, with
    routers that were right so often."""
    pool, shelves = make(0, 3)
    clock = Clock()
    costs = ExpertCosts(cpu_s=lambda rows: COMPUTE_S * rows, device_s=None, read_s=READ_S)
    ahead = LookAhead(pool, LayerScheduler(costs), clock=clock)
    for layer in (0, 1, 2):  # from which it knows what lies between layers; the first may follow another kind of layer
        run(pool, ahead, event(layer, [0], None), together=together)
        clock.now_s += between_s
    for _ in range(taught):
        run(pool, ahead, event(0, [1], [2, 4]), together=together)
        run(pool, ahead, event(1, [2, 4], None), together=together)
    shelves.reads.clear()
    return pool, shelves, ahead, clock


def test_the_next_layers_experts_are_read_while_the_drive_would_rest() -> None:
    pool, shelves, ahead, _ = made(between_s=10.0)
    run(pool, ahead, event(0, [1], [2, 4]))
    blocks = [1, 1 + 18, 6 + 2, 6 + 2 + 18, 6 + 4, 6 + 4 + 18]
    assert shelves.reads == blocks
    shelves.reads.clear()
    run(pool, ahead, event(1, [2, 3], None))
    assert shelves.reads == [6 + 3, 6 + 3 + 18]
    found = ahead.statistics()
    assert (found.asked, found.prefetched, found.used) == (9, 2, 1)
    assert found.gained_s > 0


def test_nothing_is_read_where_there_is_no_time() -> None:
    pool, shelves, ahead, _ = made(between_s=0.1)
    run(pool, ahead, event(0, [1], [2, 4]))
    assert shelves.reads == [1, 1 + 18]
    assert (ahead.statistics().asked, ahead.statistics().prefetched) == (9, 0)


def test_only_what_stands_so_high_that_it_was_right_before_is_read() -> None:
    """The first of the two that routers name is always needed, the second every other time."""
    pool, shelves, ahead, _ = made(between_s=10.0, taught=0)
    for step in range(12):
        run(pool, ahead, event(0, [1], [2, 4]))
        run(pool, ahead, event(1, [2, 4] if step % 2 else [2, 3], None))
    shelves.reads.clear()
    run(pool, ahead, event(0, [1], [2, 4]))
    assert shelves.reads == [1, 1 + 18, 6 + 2, 6 + 2 + 18]
    assert ahead.statistics().used == ahead.statistics().prefetched > 0


def test_nobody_asks_what_a_layer_needs_that_has_everything() -> None:
    pool, _ = make(18, 1)
    costs = ExpertCosts(cpu_s=lambda rows: COMPUTE_S, device_s=None, read_s=READ_S)
    ahead = LookAhead(pool, LayerScheduler(costs), clock=Clock())
    assert ahead.wants_guesses(0)
    for layer in range(2):
        run(pool, ahead, event(layer, range(6), None))
    assert not ahead.wants_guesses(0)
    assert ahead.wants_guesses(1)


def test_it_stops_when_routers_guess_wrong() -> None:
    pool, shelves, ahead, _ = made(between_s=10.0)
    for _ in range(40):
        run(pool, ahead, event(0, [1], [2, 4]))
        run(pool, ahead, event(1, [0, 5], None))  # never what was guessed
    found = ahead.statistics()
    assert found.used == 0
    assert found.prefetched < 40
    shelves.reads.clear()
    run(pool, ahead, event(0, [1], [2, 4]))
    assert shelves.reads == [1, 1 + 18]


def test_what_many_tokens_pass_through_is_used_before_others_are_brought() -> None:
    """All slots are taken by what the layer misses itself; each that is free at last gets an expert of the next."""
    pool, shelves, ahead, _ = made(between_s=10.0, together=True)
    with pool.layer(each := event(0, [0, 1, 3, 5], [2, 4])) as layer:
        ahead.begun(each, layer, together=True)
        assert pool.brought_ahead == []
        for part in range(pool.parts):
            for expert in layer.order:
                with layer.lent(part, expert, lambda: None):
                    assert len(shelves.lying) <= 2 * 3
        ahead.ended(each)
    assert pool.brought_ahead == [2, 4]
    own = [0, 1, 3, 5]
    assert sorted(shelves.reads[:8]) == sorted([*own, *(expert + 18 for expert in own)])
    assert shelves.reads[8:] == [6 + 2, 6 + 2 + 18, 6 + 4, 6 + 4 + 18]
    shelves.reads.clear()
    run(pool, ahead, event(1, [2, 4], None), together=True)
    assert shelves.reads == []
    assert (ahead.statistics().prefetched, ahead.statistics().used) == (2, 2)


def test_a_micro_batch_alone_brings_nothing_later() -> None:
    pool, shelves, ahead, _ = made(between_s=10.0)
    run(pool, ahead, event(0, [0, 1, 3, 5], [2, 4]))
    assert len(shelves.reads) == 8
    assert pool.brought_ahead == []
    run(pool, ahead, event(1, [2, 4], None))
    assert ahead.statistics().prefetched == 0


def test_what_sweeps_teach_says_nothing_of_layers_alone() -> None:
    pool, shelves, ahead, clock = made(between_s=10.0, together=True)
    for layer in (0, 1):
        run(pool, ahead, event(layer, [0], None))
        clock.now_s += 10.0
    shelves.reads.clear()
    run(pool, ahead, event(0, [1], [2, 4]))  # whose advice has not been right nine times in ten yet
    assert shelves.reads == [1, 1 + 18]
    run(pool, ahead, event(0, [1], [2, 4]), together=True)
    assert shelves.reads[2:] == [1, 1 + 18, 6 + 2, 6 + 2 + 18, 6 + 4, 6 + 4 + 18]


def test_a_layer_that_fails_leaves_nothing_to_be_brought() -> None:
    pool, shelves, ahead, _ = made(between_s=10.0, together=True)

    def stopped() -> None:
        with pool.layer(each := event(0, [0, 1, 3, 5], [2, 4])) as layer:
            ahead.begun(each, layer, together=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    run(pool, ahead, event(1, [2, 4], None), together=True)
    shelves.reads.clear()
    run(pool, ahead, event(1, [0, 3], None), together=True)
    assert sorted(shelves.reads) == [6, 6 + 3, 6 + 18, 6 + 3 + 18]
    assert len(pool._free[0]) == len(pool._free[1]) == 3


@pytest.mark.parametrize("together", [False, True])
def test_it_stops_where_deciding_takes_longer_than_it_saves(together: bool) -> None:
    pool, _, ahead, clock = made(between_s=0.1, together=together)

    def ask() -> Ids:
        clock.now_s += 0.001
        return np.array([[2, 4]], np.uint16)

    asked = 0
    for _ in range(PAUSE + 10):
        guesses = ahead.guesses(0, ask, together=together)
        asked += guesses is not None
        run(pool, ahead, event(0, [1], None if guesses is None else [2, 4]), together=together)
        run(pool, ahead, event(1, [2, 4], None), together=together)
        if guesses is None:
            break
    assert asked < PAUSE
    found = ahead.statistics()
    assert found.prefetched == 0  # there is no time for it
    assert found.gained_s == pytest.approx(-0.001 * asked)
    assert "ms more than they saved" in found.off


def beside_a_device(capacity: int, between_s: float) -> tuple[ExpertPool, Shelves, LookAhead, LayerScheduler]:
    """A device that computes in no time, a CPU that takes 1 s per token, and a copy as long as one and a half."""
    pool, shelves = make(capacity, 3, apart=True)
    clock = Clock()
    costs = ExpertCosts(cpu_s=lambda rows: 1.0 * rows, device_s=lambda rows: 0.01, copy_s=1.5)
    scheduler = LayerScheduler(costs)
    ahead = LookAhead(pool, scheduler, clock=clock)
    for layer in (0, 1):
        run(pool, ahead, event(layer, [0], None))
        clock.now_s += between_s
    shelves.reads.clear()
    return pool, shelves, ahead, scheduler


def test_what_the_cpu_computes_is_copied_to_the_device_while_the_link_rests() -> None:
    pool, shelves, ahead, scheduler = beside_a_device(6, between_s=10.0)
    pool.share_with_cpu(scheduler)
    run(pool, ahead, event(2, [3], None))  # the CPU has it sooner than a copy
    assert shelves.reads == [12 + 3, 12 + 3 + 18]
    counted = pool.statistics().decode
    assert (counted.computed_by_cpu, counted.copied_nbytes) == (1, 300)
    run(pool, ahead, event(2, [3], None))
    assert len(shelves.reads) == 2
    counted = pool.statistics().decode
    assert (counted.computed_by_cpu, counted.hits["filled"], counted.copied_nbytes) == (1, 1, 300)


def test_what_was_filled_is_waited_for_before_it_goes() -> None:
    pool, shelves, ahead, scheduler = beside_a_device(3, between_s=10.0)
    pool.share_with_cpu(scheduler)
    for step, expert in enumerate((3, 4, 5, 3)):  # one slot of this layer's: each goes for the next one
        run(pool, ahead, event(2, [expert], None))
        assert int(pool.cache.held[2].sum()) == 1
        assert len(shelves.reads) == 2 * (step + 1)
    assert len(shelves.lying) == 2 * int(pool.cache.held.sum())


def test_nothing_is_filled_where_the_link_has_no_time() -> None:
    pool, shelves, ahead, scheduler = beside_a_device(6, between_s=0.1)
    pool.share_with_cpu(scheduler)
    run(pool, ahead, event(2, [3], None))
    assert shelves.reads == []


def test_the_next_layers_experts_are_copied_from_host_memory() -> None:
    pool, shelves, ahead, _ = beside_a_device(0, between_s=10.0)
    for _ in range(8):
        run(pool, ahead, event(0, [1], [2, 4]))
        run(pool, ahead, event(1, [2, 4], None))
    shelves.reads.clear()
    run(pool, ahead, event(0, [1], [2, 4]))
    assert shelves.reads == [1, 1 + 18, 6 + 2, 6 + 2 + 18, 6 + 4, 6 + 4 + 18]
    shelves.reads.clear()
    copied = pool.statistics().decode.copied_nbytes
    run(pool, ahead, event(1, [2, 4], None))
    assert shelves.reads == []
    assert pool.statistics().decode.copied_nbytes == copied
    assert pool.statistics().decode.read_nbytes == 0
