"""What of a layer to hold: against all ways to hold some of it, and what must hold of any."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.scheduler.recomputing import Step, carried_out, carried_s, choices


def slowly_carried_s(steps: Sequence[Step], held: set[int]) -> float:
    """Seconds, by going from the last step to the first."""
    wanted = {n for n, step in enumerate(steps) if step.forced or (step.needed and n not in held)}
    total = 0.0
    for number in reversed(range(len(steps))):
        if number in wanted:
            total += steps[number].seconds
            wanted |= {each for each in steps[number].inputs if each not in held}
    return total


@st.composite
def layers(draw: st.DrawFn) -> list[Step]:
    """Steps that use some before them. What is needed can be held."""
    found: list[Step] = []
    for number in range(draw(st.integers(1, 6))):
        needed = draw(st.booleans())
        inputs = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        nbytes = float(draw(st.integers(1, 9)))
        found.append(
            Step(
                inputs=tuple(sorted(inputs)),
                seconds=float(draw(st.sampled_from([0, 1, 2, 5, 30]))),
                nbytes=nbytes if needed or draw(st.booleans()) else inf,
                needed=needed,
                forced=not needed and draw(st.integers(0, 4)) == 0,
            )
        )
    return found


@settings(max_examples=300, deadline=None)
@given(layers())
def test_the_first_choice_saves_most_per_byte_of_all_there_are(steps: list[Step]) -> None:
    able = [n for n, step in enumerate(steps) if step.nbytes < inf]
    whole = carried_s(steps, set())
    best = 0.0
    for count in range(1, len(able) + 1):
        for some in itertools.combinations(able, count):
            saved = whole - slowly_carried_s(steps, set(some))
            best = max(best, saved / sum(steps[n].nbytes for n in some))
    found = choices(steps)
    if best * 9 > 1e-3 * whole:
        assert found[0].seconds / found[0].nbytes >= best * (1 - 1e-6)


@settings(max_examples=300, deadline=None)
@given(layers())
def test_choices_add_up_and_fall_and_end_with_nothing_to_be_carried_out(steps: list[Step]) -> None:
    held: set[int] = set()
    left = whole = slowly_carried_s(steps, held)
    found = choices(steps)
    for place, each in enumerate(found):
        assert not held & set(each.steps)
        held |= set(each.steps)
        assert each.nbytes == sum(steps[n].nbytes for n in each.steps)
        left -= each.seconds
        if place < len(found) - 1:
            assert left == pytest.approx(slowly_carried_s(steps, held), abs=1e-4 * max(whole, 1))
            after = found[place + 1]
            assert after.seconds * each.nbytes <= each.seconds * after.nbytes * (1 + 1e-6) + 1e-9
    assert {n for n, step in enumerate(steps) if step.needed} <= held
    assert left == pytest.approx(0.0, abs=1e-9 * max(whole, 1))


def test_a_sum_that_nobody_needs_spares_the_product_before_it() -> None:
    """product, sum of it, norm of that, which backward needs: to hold the sum is the cheaper way to hold the norm."""
    steps = [
        Step(seconds=100.0, nbytes=inf),
        Step(inputs=(0,), seconds=1.0, nbytes=2.0),
        Step(inputs=(1,), seconds=2.0, nbytes=4.0, needed=True),
    ]
    first, last = choices(steps)
    assert (first.steps, first.nbytes, first.seconds) == ((1,), 2, 101.0)
    assert (last.steps, last.seconds) == ((2,), 2.0)


def test_of_results_that_are_soon_made_of_others_only_the_others_are_held_first() -> None:
    """Two products, and what is made of both: gate, up, and the product that the last matrix is given."""
    steps = [
        Step(seconds=50.0, nbytes=3.0, needed=True),
        Step(seconds=50.0, nbytes=3.0, needed=True),
        Step(inputs=(0,), seconds=1.0, nbytes=3.0, needed=True),
        Step(inputs=(1, 2), seconds=1.0, nbytes=3.0, needed=True),
    ]
    first, rest = choices(steps)
    assert (first.steps, first.seconds) == ((0, 1), 100.0)
    assert (rest.steps, rest.seconds) == ((2, 3), 2.0)


def test_what_is_forced_is_saved_only_with_all_the_rest() -> None:
    steps = [
        Step(seconds=10.0, nbytes=4.0, needed=True),
        Step(inputs=(0,), seconds=3.0, nbytes=inf, forced=True),
        Step(inputs=(1,), seconds=0.0, nbytes=1.0, needed=True),
    ]
    assert carried_out(steps, {0}) == frozenset({1, 2})
    assert carried_out(steps, {0, 2}) == frozenset({1})
    assert [(each.steps, each.seconds) for each in choices(steps)] == [((0, 2), 13.0)]
    assert carried_s(steps, ()) == 13.0
