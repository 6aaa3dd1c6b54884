"""What crosses the link is what makes both sides end together, whatever their rates are, after a few calls."""

from __future__ import annotations

from statistics import median

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.scheduler.kv.balance import FIRST, Balance, Seen

UNIT = 4 * 2**20


def run(balance: Balance, pieces: int, cpu: float, link: float, *, queries: int = 2) -> tuple[int, float]:
    """A call on a machine with these rates; what crossed, and how long it took."""
    crossing = balance.to_cross(queries, pieces=pieces, nbytes=pieces * UNIT)
    cpu_s, link_s = (pieces - crossing) * UNIT / cpu, crossing * UNIT / link
    seen = Seen(
        cpu_nbytes=(pieces - crossing) * UNIT,
        cpu_s=cpu_s,
        link_nbytes=crossing * UNIT,
        link_s=max(link_s, cpu_s),  # a copy that ended before the CPU did is seen when that ends
        waited=link_s > cpu_s,
    )
    balance.hear(queries, seen)
    return crossing, max(cpu_s, link_s)


@settings(max_examples=200)
@example(6, 57561411705.0, 12516537332.0)
@given(st.integers(2, 60), st.floats(1e8, 1e11), st.floats(1e8, 1e11))
def test_a_few_calls_are_enough(pieces: int, cpu: float, link: float) -> None:
    balance = Balance()
    took_s = median([run(balance, pieces, cpu, link)[1] for _ in range(38)][8:])  # some calls try more, to learn
    best_s = min(max((pieces - count) * UNIT / cpu, count * UNIT / link) for count in range(pieces + 1))
    assert took_s <= best_s * 1.35 + UNIT / max(cpu, link)


def test_both_sides_get_something_at_first_and_each_number_of_queries_is_learned_by_itself() -> None:
    balance = Balance()
    for call in range(FIRST):
        crossing, _ = run(balance, 8, 1e9, 1e12)
        assert 0 < crossing < 8, call
    for _ in range(12):  # that the link is so much faster shows only by and by
        crossing, _ = run(balance, 8, 1e9, 1e12)
    assert crossing == 8
    assert balance.rates(2)[0] == pytest.approx(1e9)
    assert balance.rates(512) == (None, None)
    assert 0 < balance.to_cross(512, pieces=8, nbytes=8 * UNIT) < 8


def test_a_single_piece_goes_to_each_in_turn_until_both_are_known() -> None:
    balance = Balance()
    first = [run(balance, 1, 2e9, 1e9)[0] for _ in range(3)]
    assert set(first[:2]) == {0, 1}
    assert balance.to_cross(2, pieces=0, nbytes=0) == 0
