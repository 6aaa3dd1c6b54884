"""Room for activations or for weights: against all ways to share out a small memory."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.scheduler.weighing import PIECES, Dear, Part, Placed, Weighing, weigh


@st.composite
def steps(draw: st.DrawFn) -> Weighing:
    kinds = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 30)), max_size=3))
    dear = [Dear(nbytes=PIECES * size, seconds=float(seconds)) for size, seconds in kinds]
    parts = [
        Part(
            compute_s=float(draw(st.integers(0, 60))),
            drive_s=float(draw(st.integers(0, 60))),
            weight_byte_s=draw(st.sampled_from([0.0, 0.1, 1.0, 5.0])),
        )
        for _ in range(2)
    ]
    return Weighing(
        dear=sorted(dear, key=lambda each: -each.seconds / each.nbytes),
        part=parts[0],
        update=parts[1] if draw(st.booleans()) else None,
    )


def slowly_best_s(step: Weighing, weights: list[int], memory: int) -> float:
    """Any parts of results, any weights that fit beside them."""
    best = float("inf")
    for parts in itertools.product(*(range(PIECES + 1) for _ in step.dear)):
        held = sum(each.nbytes * part // PIECES for each, part in zip(step.dear, parts, strict=True))
        again = sum(each.seconds * (1 - part / PIECES) for each, part in zip(step.dear, parts, strict=True))
        for stay in itertools.product((False, True), repeat=len(weights)):
            if held + sum(itertools.compress(weights, stay)) <= memory:
                gone = sum(nbytes for nbytes, stays in zip(weights, stay, strict=True) if not stays)
                seconds = max(step.part.compute_s + again, step.part.drive_s + step.part.weight_byte_s * gone)
                if (update := step.update) is not None:
                    seconds += max(update.compute_s, update.drive_s + update.weight_byte_s * gone)
                best = min(best, seconds)
    return best


@settings(max_examples=200, deadline=None)
@given(steps(), st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 40))
def test_no_other_sharing_of_memory_makes_a_step_shorter_by_more_than_a_part(
    step: Weighing, weights: list[int], memory: int
) -> None:
    def place(room: int) -> Placed | None:
        fits = [
            sum(itertools.compress(weights, stay))
            for stay in itertools.product((False, True), repeat=len(weights))
            if room + sum(itertools.compress(weights, stay)) <= memory
        ]
        return Placed(streamed_nbytes=sum(weights) - max(fits)) if fits else None

    found = weigh(step, place)
    plain = place(0)
    assert plain is not None
    seconds = step.step_s(0, plain) if found is None else found.seconds
    part = max((each.seconds / PIECES for each in step.dear), default=0.0)
    assert seconds <= slowly_best_s(step, weights, memory) + part + 1e-9
    if found is not None:
        assert found.seconds < found.without_s == step.step_s(0, plain)
        assert found.nbytes <= memory


def streaming(room: int) -> Placed:
    """Of memory that is full, each byte of room takes one of weights."""
    return Placed(streamed_nbytes=float(room))


def test_where_the_drive_is_the_bound_weights_have_the_room() -> None:
    dear = [Dear(nbytes=100, seconds=5.0)]
    bound = Weighing(dear=dear, part=Part(compute_s=10.0, drive_s=20.0, weight_byte_s=0.1))
    spare = Weighing(dear=dear, part=Part(compute_s=30.0, drive_s=20.0, weight_byte_s=0.04))
    assert weigh(bound, streaming) is None
    found = weigh(spare, streaming)
    assert found is not None
    assert (found.nbytes, found.seconds, found.without_s) == (100, 30.0, 35.0)


def test_weights_that_cannot_do_without_memory_keep_it() -> None:
    step = Weighing(dear=[Dear(nbytes=100, seconds=5.0)], part=Part(compute_s=30.0, drive_s=0.0, weight_byte_s=0.0))
    found = weigh(step, lambda room: streaming(room) if room <= 60 else None)
    assert found is not None
    assert found.nbytes == 50


def test_a_drive_that_is_busy_beside_the_update_has_no_time_to_spare_in_backward() -> None:
    dear, idle = [Dear(nbytes=100, seconds=5.0)], Part(compute_s=30.0, drive_s=0.0, weight_byte_s=0.04)
    busy = Part(compute_s=10.0, drive_s=12.0, weight_byte_s=0.08)
    assert weigh(Weighing(dear=dear, part=idle, update=busy), streaming) is None
    found = weigh(
        Weighing(dear=dear, part=idle, update=Part(compute_s=20.0, drive_s=12.0, weight_byte_s=0.08)), streaming
    )
    assert found is not None
    assert (found.nbytes, found.seconds, found.without_s) == (100, 50.0, 55.0)


def test_gradients_and_states_that_results_would_drive_out_count() -> None:
    dear = [Dear(nbytes=100, seconds=5.0)]
    part = Part(compute_s=30.0, weight_byte_s=1.0, gradient_byte_s=0.1)
    update = Part(compute_s=1.0, weight_byte_s=1.0, gradient_byte_s=0.1, state_byte_s=0.2)
    step = Weighing(dear=dear, part=part, update=update, gradients_nbytes=100.0, states_nbytes=100.0)
    free = Placed(streamed_nbytes=0.0, free_nbytes=150.0)
    assert step.step_s(0, free) == 30.0 + 5.0 + max(1.0, 0.2 * 50)
    assert step.step_s(100, Placed(streamed_nbytes=0.0, free_nbytes=50.0)) == 30.0 + max(1.0, 0.1 * 50 + 0.2 * 100)
    assert weigh(step, lambda room: Placed(streamed_nbytes=0.0, free_nbytes=150.0 - room)) is None
    # where activations have what gradients leave, before states, no more need be set aside for them
    wanting = Weighing(
        dear=dear, part=part, update=update, gradients_nbytes=100.0, states_nbytes=100.0, saved_nbytes=50.0
    )
    assert wanting.step_s(0, free) == 30.0 + 2.5 + max(1.0, 0.2 * 100)
