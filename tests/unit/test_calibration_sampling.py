"""Repetitions in turns: medians, spreads, and when they end."""

import pytest
from fakeclock import FakeClock

from penstock.memory.errors import PenstockError
from penstock.runtime.calibration.sampling import Figure, curve, figure, in_turns


def test_a_figure_is_the_median_with_its_spread() -> None:
    assert figure([2.0, 8.0, 4.0]) == Figure(value=4.0, spread=1.5)
    assert figure([5.0]) == Figure(value=5.0, spread=0.0)


def test_turns_go_there_and_back_until_the_time_is_up() -> None:
    clock, seen = FakeClock(), []

    def once(name: int) -> float:
        seen.append(name)
        clock.take(1.0)
        return float(name * 10 + len(seen))

    found = in_turns({x: (lambda x=x: once(x)) for x in (1, 2)}, seconds=7.5, clock=clock)  # type: ignore[misc]
    assert seen == [1, 2, 2, 1, 1, 2, 2, 1]
    assert found[1] == figure([11.0, 14.0, 15.0, 18.0])


def test_slow_points_get_one_turn_and_fast_ones_no_more_than_enough() -> None:
    clock, calls = FakeClock(), []

    def slow() -> float:
        calls.append(1)
        clock.take(10.0)
        return 1.0

    in_turns({1: slow}, seconds=1.0, clock=clock)
    assert len(calls) == 1
    calls.clear()
    in_turns({1: slow}, seconds=1e9, clock=clock, most=4)
    assert len(calls) == 4
    calls.clear()
    in_turns({1: slow}, seconds=16.0, clock=clock)  # two would be in time, three take less than twice as long
    assert len(calls) == 3


@pytest.mark.parametrize("nothing", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clock_that_is_too_coarse(nothing: float) -> None:
    with pytest.raises(PenstockError, match="too coarse"):
        in_turns({1: lambda: nothing}, seconds=1.0, clock=FakeClock())


def test_a_curve_keeps_the_spreads() -> None:
    made = curve({4: Figure(value=2.0, spread=0.5), 1: Figure(value=1.0, spread=0.1)})
    assert (made.x, made.y, made.spread) == ((1.0, 4.0), (1.0, 2.0), (0.1, 0.5))
