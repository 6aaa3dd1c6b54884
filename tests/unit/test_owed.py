"""Updates that are owed: against one list of updates per part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.scheduler.owed import Idleness, OwedUpdate, OwedUpdates, worth_owing

PARTS = {0: 7, 1: 7, 2: 9, 3: 7}
"""The parameter of each part."""


@given(st.lists(st.tuples(st.sampled_from(["step", "settle"]), st.integers(0, 3)), max_size=60))
def test_a_part_settles_what_its_parameter_was_told_since_it_did_last(events: list[tuple[str, int]]) -> None:
    ledger = OwedUpdates(PARTS)
    owed: dict[int, list[OwedUpdate]] = {part: [] for part in PARTS}
    for number, (kind, part) in enumerate(events):
        if kind == "step":
            update = OwedUpdate(hyper=f"rate {number}", count=number + 1)
            ledger.step(PARTS[part], update)
            for other, parameter in PARTS.items():
                if parameter == PARTS[part]:
                    owed[other].append(update)
        else:
            assert ledger.settle(part) == tuple(owed[part])
            owed[part].clear()
        assert {each: ledger.owed(each) for each in PARTS} == {each: len(owed[each]) for each in PARTS}
        for parameter in (7, 9):
            assert ledger.owing(parameter) == [each for each in PARTS if PARTS[each] == parameter and owed[each]]


def test_what_all_parts_have_had_is_forgotten() -> None:
    ledger = OwedUpdates({0: 0, 1: 0})
    for count in range(1, 101):
        ledger.step(0, OwedUpdate(hyper=None, count=count))
        assert [each.count for each in ledger.settle(0)] == [count]
        if count % 10 == 0:
            assert [each.count for each in ledger.settle(1)] == list(range(count - 9, count + 1))
        assert len(ledger._kept[0]) <= 10


def test_a_shard_is_left_out_where_weights_cost_less_than_what_it_spares() -> None:
    assert worth_owing(spared_nbytes=1, again=0.0, weights_nbytes=0)
    assert not worth_owing(spared_nbytes=0, again=0.0, weights_nbytes=0)
    assert worth_owing(spared_nbytes=2 * 100 + 1, again=0.0, weights_nbytes=100)
    assert not worth_owing(spared_nbytes=2 * 100, again=0.0, weights_nbytes=100)
    assert worth_owing(spared_nbytes=4 * 100 + 1, again=0.5, weights_nbytes=100)
    assert not worth_owing(spared_nbytes=4 * 100, again=0.5, weights_nbytes=100)
    assert not worth_owing(spared_nbytes=4 * 100, again=1.0, weights_nbytes=0)  # each is moved all the same


def test_what_was_idle_and_came_back_is_a_share_of_what_was_idle_and_fades() -> None:
    seen = Idleness()
    assert seen.step({1, 2, 3, 4}) == 0.0
    assert seen.step({2, 3, 4, 5}) == 1 / 4
    assert seen.step({2, 3, 4, 5}) == 0.9 / (0.9 * 4 + 4)
    for _ in range(200):
        last = seen.step(frozenset())
    assert last == pytest.approx((0.9 * 0.9 + 4) / (0.9 * 7.6 + 4))  # nothing was idle since
