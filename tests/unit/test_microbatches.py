"""How prompts are cut into micro-batches, and how many run at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.errors import DoesNotFitError
from penstock.scheduler.microbatches import (
    MOST_LANES,
    Footprint,
    Job,
    Machine,
    MicroBatch,
    Prefills,
    Schedule,
    cut,
    schedule,
    worth_compacting,
)
from penstock.scheduler.mixture import Mixture

FOOTPRINT = Footprint(
    kv_nbytes_per_token=100, activation_nbytes_per_token=40, held_nbytes_per_token=20, logits_nbytes_per_sequence=10
)
GIB = 2**30


def jobs(*lengths: int, new: int = 8) -> list[Job]:
    return [Job(index=i, prompt_tokens=length, new_tokens=new) for i, length in enumerate(lengths)]


def machine(room: int, *, weights: int = 10**9, sweep_s: float | None = 1.0) -> Machine:
    return Machine(room_nbytes=room, weights_nbytes=weights, sweep_s=sweep_s)


def test_the_longest_come_first_and_like_lengths_together() -> None:
    batches = cut(jobs(5, 40, 9, 38, 10, 6), 2, pads=True)
    assert [batch.indices for batch in batches] == [(1, 3), (4, 2), (5, 0)]
    assert [batch.prompt_tokens for batch in batches] == [40, 10, 6]


def test_little_is_padding() -> None:
    assert [b.indices for b in cut(jobs(40, 20, 19), 3, pads=True)] == [(0, 1), (2,)]


def test_equal_lengths_only_where_padding_is_not_allowed() -> None:
    batches = cut(jobs(5, 6, 5, 6, 6), 2, pads=False)
    assert [batch.indices for batch in batches] == [(1, 3), (4,), (0, 2)]


def test_prompts_that_go_on_longer_run_together() -> None:
    mixed = [Job(index=0, prompt_tokens=9, new_tokens=4), Job(index=1, prompt_tokens=3, new_tokens=64)]
    (first, second) = cut(mixed, 2, pads=True)
    assert (first.indices, first.new_tokens) == ((1,), 64)
    assert (second.indices, second.new_tokens) == ((0,), 4)


def test_with_plenty_of_room_all_run_at_once_in_few_lanes() -> None:
    found = schedule(jobs(*[32] * 64), FOOTPRINT, machine(GIB, sweep_s=0.1))
    assert (found.lanes, len(found.batches), found.sweeps) == (1, 1, 8)


def test_many_lanes_where_only_a_small_prefill_fits() -> None:
    """Room for all keys and values, and for the activations of four prompts at a time."""
    room = 64 * 40 * 100 + 4 * 32 * 40 + 640
    found = schedule(jobs(*[32] * 64), FOOTPRINT, machine(room))
    assert found.lanes > 1
    assert found.nbytes <= room
    assert found.prefill_tokens < 64 * 32


def test_weights_give_way_to_sequences_where_that_is_faster() -> None:
    """Most of the model could stay; more of it is streamed, because a sweep then serves sixteen sequences."""
    footprint = Footprint(
        kv_nbytes_per_token=10**6, activation_nbytes_per_token=0, held_nbytes_per_token=0, logits_nbytes_per_sequence=0
    )
    room = Machine(room_nbytes=10**9, weights_nbytes=12 * 10**8, sweep_s=None, memory_rate=1e12)
    found = schedule(jobs(*[24] * 16), footprint, room)
    assert found.nbytes == 16 * 32 * 10**6


def test_what_each_lane_keeps_counts_against_the_room() -> None:
    """Three lanes of four prompts each take 48 000 bytes of keys and values, and buffers of 5000 besides."""
    more = replace(FOOTPRINT, lane_nbytes=5000)
    plain = schedule(jobs(*[32] * 12), FOOTPRINT, machine(GIB), rows=4, lanes=3)
    found = schedule(jobs(*[32] * 12), more, machine(GIB), rows=4, lanes=3)
    assert found.nbytes == plain.nbytes + 3 * 5000
    with pytest.raises(DoesNotFitError):
        schedule(jobs(*[32] * 12), more, machine(plain.nbytes), rows=4, lanes=3)


def test_tokens_of_other_lanes_that_wait_to_be_computed_together_count_against_the_room() -> None:
    """Two lanes of four prompts meet a third."""
    more = replace(FOOTPRINT, meeting_nbytes_per_token=700)
    for lanes in (1, 3):
        plain = schedule(jobs(*[32] * 12), FOOTPRINT, machine(GIB), rows=4, lanes=lanes)
        found = schedule(jobs(*[32] * 12), more, machine(GIB), rows=4, lanes=lanes)
        assert found.nbytes == plain.nbytes + (lanes - 1) * 4 * 700


def test_a_long_prompt_is_prefilled_in_pieces() -> None:
    found = schedule(jobs(1000), FOOTPRINT, machine(1008 * 100 + 256 * 40 + 10))
    (batch,) = found.batches
    assert batch.chunk == 256
    assert (batch.prefill_tokens, batch.prefill_sweeps) == (256, 4)
    assert found.sweeps == 11


def test_what_does_not_fit_says_by_how_much() -> None:
    with pytest.raises(DoesNotFitError, match=r"need \d+ bytes .*fewer new tokens") as caught:
        schedule(jobs(1000), FOOTPRINT, machine(1000))
    assert caught.value.available_nbytes == 1000
    assert schedule(jobs(1000), FOOTPRINT, machine(caught.value.needed_nbytes)).lanes == 1


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    room=st.integers(10**3, 10**7),
    sweep_s=st.none() | st.floats(0, 10),
    pads=st.booleans(),
    lane_nbytes=st.sampled_from([0, 0, 10**4]),
)
def test_every_prompt_runs_once_within_the_room(
    lengths: list[int], room: int, sweep_s: float | None, pads: bool, lane_nbytes: int
) -> None:
    footprint = replace(FOOTPRINT, lane_nbytes=lane_nbytes)
    try:
        found = schedule(jobs(*lengths), footprint, machine(room, sweep_s=sweep_s), pads=pads)
    except DoesNotFitError as error:
        assert error.needed_nbytes > room  # noqa: PT017  # most examples fit
        return
    assert sorted(index for batch in found.batches for index in batch.indices) == list(range(len(lengths)))
    assert 1 <= found.lanes <= min(MOST_LANES, len(found.batches))
    assert found.nbytes <= room
    for batch in found.batches:
        own = [lengths[index] for index in batch.indices]
        assert batch.prompt_tokens == max(own)
        assert pads or len(set(own)) == 1
    again = schedule(jobs(*lengths), footprint, machine(room, sweep_s=sweep_s), pads=pads)
    assert again == found


def test_what_the_caller_decides_is_kept() -> None:
    found: Schedule = schedule(jobs(*[32] * 12), FOOTPRINT, machine(GIB), rows=3, lanes=2)
    assert found.lanes == 2
    assert [len(batch.indices) for batch in found.batches] == [3, 3, 3, 3]


def batch(tokens: int, *, chunk: int | None = None) -> MicroBatch:
    return MicroBatch(indices=(0,), prompt_tokens=tokens, new_tokens=1, chunk=chunk)


def test_prefills_take_turns() -> None:
    prefills = Prefills(100)
    assert prefills.admits(batch(500), coming=1), "alone it may be any size"
    assert not prefills.admits(batch(10), coming=1)
    assert prefills.admits(batch(60), coming=2)
    assert not prefills.admits(batch(60), coming=2)
    assert prefills.admits(batch(40), coming=2)


def test_a_prefill_in_pieces_counts_until_its_last_piece() -> None:
    prefills = Prefills(100)
    assert prefills.admits(batch(240, chunk=80), coming=1)
    assert not prefills.admits(batch(30), coming=3)
    assert prefills.admits(batch(30), coming=4)


@pytest.mark.parametrize(
    ("live", "rows", "left", "worth"),
    [(3, 4, 10, True), (4, 4, 10, False), (7, 8, 10, False), (6, 8, 10, True), (3, 4, 2, False), (0, 4, 0, False)],
)
def test_when_a_batch_is_made_smaller(live: int, rows: int, left: int, worth: bool) -> None:
    assert worth_compacting(live=live, rows=rows, steps_left=left) is worth


def test_many_prompts_are_planned_in_no_time() -> None:
    """The choices that are tried do not grow with the prompts."""
    many = [Job(index=i, prompt_tokens=32 + i * 37 % 900, new_tokens=32) for i in range(5000)]
    found = schedule(many, FOOTPRINT, machine(10**7))
    assert sum(len(batch.indices) for batch in found.batches) == 5000
    assert found.nbytes <= 10**7


def test_a_mixture_moves_the_experts_that_the_tokens_of_a_sweep_use() -> None:
    mixture = Mixture(share=0.25, nbytes=6 * 10**8, sweep_s=2.0)
    there = Machine(room_nbytes=GIB, weights_nbytes=10**9, sweep_s=0.5, mixture=mixture, memory_rate=1e9)
    assert there.moved_s(0, 1) == pytest.approx(0.5 + 2.0 * 0.25)
    assert there.moved_s(0, 2) == pytest.approx(0.5 + 2.0 * (1 - 0.75**2))
    assert there.moved_s(0, 100) == pytest.approx(2.5)
    assert there.pass_s(1) == pytest.approx(0.4 + 0.6 * 0.25)
    assert there.pass_s(100) == pytest.approx(1.0)
    unplaced = replace(there, sweep_s=None, room_nbytes=5 * 10**8, disk_rate=1e8)
    assert unplaced.moved_s(10**8, 100) == pytest.approx(6.0)  # 400 MB of 1000 stay
    assert unplaced.moved_s(10**8, 1) == pytest.approx(6.0 * 0.25)  # what is missing is experts


def test_sharing_a_sweep_is_worth_less_the_fewer_experts_its_tokens_have_in_common() -> None:
    """With as many experts per token as there are, all is shared; with few of many, little is until there are many."""
    seconds = []
    for share in (1.0, 0.01):
        mixture = Mixture(share=share, nbytes=10**9, sweep_s=1.0)
        there = Machine(room_nbytes=GIB, weights_nbytes=10**9, sweep_s=0.0, mixture=mixture, memory_rate=1e15)
        one, eight = (schedule(jobs(*[4] * 8), FOOTPRINT, there, rows=1, lanes=lanes).seconds for lanes in (1, 8))
        seconds.append(one / eight)
    assert seconds[0] > 5
    assert seconds[1] < 1.3
