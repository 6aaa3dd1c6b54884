"""Which calls have their layers recorded, and what that costs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.runtime.profiler.turns import (
    COLD_NS,
    EVENT_NS,
    FIRST,
    FIRST_STEPS,
    RAREST,
    SHARE,
    STEP_SHARE,
    StepTurns,
    Turns,
)


def whole(turns: Turns, calls: int, ns: int) -> list[int]:
    """The numbers of the calls of `ns` each that are recorded whole."""
    found = []
    for number in range(calls):
        if turns.next():
            found.append(number)
        turns.took(ns)
    return found


def test_calls_that_dwarf_their_hooks_are_all_recorded_whole() -> None:
    assert whole(Turns(20), 50, int(20 * COLD_NS / SHARE) + 1) == list(range(50))


def test_of_short_calls_so_many_are_that_their_hooks_take_their_share() -> None:
    ns = int(12 * COLD_NS / SHARE) // 5
    assert whole(Turns(12), 26, ns) == [0, 1, 6, 11, 16, 21]


def test_what_hooks_cost_and_may_take_can_be_said() -> None:
    assert whole(Turns(12, cold_ns=1000, share=0.5), 26, 12 * 1000 // 5 * 2) == [0, 1, 6, 11, 16, 21]


def test_of_very_short_calls_some_are() -> None:
    assert whole(Turns(100), 2 * RAREST + FIRST, 1000) == [0, 1, RAREST + 1, 2 * RAREST + 1]


def test_a_long_prompt_does_not_make_the_tokens_after_it_look_long() -> None:
    turns, token = Turns(12), int(12 * COLD_NS / SHARE) // 10
    assert turns.next()
    turns.took(1000 * token)
    assert turns.next()
    turns.took(token)
    assert whole(turns, 12, token) == [9]


@given(st.integers(1, 200), st.lists(st.integers(10**4, 10**9), min_size=100, max_size=400))
def test_hooks_never_take_more_than_their_share_but_for_the_rare_calls_that_always_are(
    layers: int, took: list[int]
) -> None:
    turns, cost, since, least = Turns(layers), layers * COLD_NS, 0, 10**9
    for number, ns in enumerate(took):
        since += 1
        if turns.next():
            assert number < FIRST or since == RAREST or cost <= SHARE * since * least * 1.0001
            since = 0
        turns.took(ns)
        least = min(ns, least * 9 // 8 + 1)


def looked_at(turns: StepTurns, steps: int, ns: int, events: int) -> list[int]:
    """The numbers of the steps of `ns` each that are looked at, where looking finds so many things in each."""
    found, at, seen = [], 0, 0
    for number in range(steps):
        turns.begins(at, seen)
        if turns.looking:
            found.append(number)
            seen += events
        at += ns
    return found


def test_steps_that_dwarf_what_looking_costs_are_all_looked_at() -> None:
    assert looked_at(StepTurns(), 30, int(40 * EVENT_NS / STEP_SHARE) + 1, 40) == list(range(30))


def test_of_short_steps_so_many_are_looked_at_that_it_takes_its_share() -> None:
    ns = int(40 * EVENT_NS / STEP_SHARE) // 4 + 1
    assert looked_at(StepTurns(), 20, ns, 40) == [0, 1, 2, 6, 10, 14, 18]


def test_of_very_short_steps_some_are_looked_at() -> None:
    assert looked_at(StepTurns(), 2 * RAREST + FIRST_STEPS, 1000, 500) == [0, 1, 2, RAREST + 2, 2 * RAREST + 2]


def test_what_comes_before_the_first_step_is_looked_at() -> None:
    assert StepTurns().looking


@given(
    st.lists(st.tuples(st.integers(10**4, 10**9), st.integers(1, 2000)), min_size=50, max_size=300),
)
def test_looking_never_takes_more_than_its_share_but_in_the_rare_steps_that_always_are(
    steps: list[tuple[int, int]],
) -> None:
    turns, at, seen, since, least, cost = StepTurns(), 0, 0, 0, 0, 0
    for number, (ns, events) in enumerate(steps):
        turns.begins(at, seen)
        since += 1
        if turns.looking:
            assert number < FIRST_STEPS or since == RAREST or cost <= STEP_SHARE * since * least * 1.0001
            since, seen, cost = 0, seen + events, events * EVENT_NS
        at += ns
        least = min(ns, least * 9 // 8 + 1) if number else ns
