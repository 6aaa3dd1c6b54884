"""Times of a device as times of the host: properties of the mapping, with distances as coarse as CUDA's."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penstock.runtime.profiler.alignment import Alignment

SECOND = 10**9


@dataclass(frozen=True)
class Event:
    at: float
    """By the device's clock, in nanoseconds."""

    def elapsed_time(self, later: Event) -> float:
        assert later.at >= self.at
        return float(np.float32((later.at - self.at) / 1e6))


@given(
    drift=st.floats(-1e-4, 1e-4),
    errors=st.lists(st.integers(-5000, 5000), min_size=2, max_size=20),
    # The first meeting is over by then: what was launched before it keeps the time of its launch.
    instants=st.lists(st.integers(5000, 19 * SECOND), min_size=1, max_size=50),
)
def test_times_are_near_and_never_run_backwards(drift: float, errors: list[int], instants: list[int]) -> None:
    alignment = Alignment()
    waiting = sorted(instants)
    placed: list[int] = []
    for second, error in enumerate(errors):
        now = second * SECOND
        # What happened before a meeting is placed before it, or after it: a look comes when it comes.
        due = [at for at in waiting if at < now]
        some, rest = due[: len(due) // 2], due[len(due) // 2 :]
        placed += [alignment.place(Event(at * (1 + drift)), at) for at in some]
        alignment.meet(Event(now * (1 + drift)), now + error, now + 5000)
        placed += [alignment.place(Event(at * (1 + drift)), at) for at in rest]
        waiting = waiting[len(due) :]
    truth = sorted(instants)[: len(placed)]
    assert all(later - earlier >= -500 for earlier, later in itertools.pairwise(placed))
    for at, found in zip(truth, placed, strict=True):
        assert abs(found - at) < 3 * 5000 + 3 * abs(drift) * SECOND + 500


def test_what_was_placed_stays_where_it_is() -> None:
    alignment = Alignment()
    alignment.meet(Event(0.0), 1000, 1010)
    event = Event(5e8)
    before = alignment.place(event, 2000)
    assert before == 1000 + 5 * 10**8
    assert alignment.meet(Event(1e9), SECOND + 9000, SECOND + 9010) == 8000
    assert alignment.place(event, 2000) == before
    assert alignment.place(Event(2e9), SECOND + 20_000) == 2 * SECOND + 9000, "made good a second later"


def test_a_leap_of_the_clock_is_made_good_slowly() -> None:
    alignment = Alignment()
    alignment.meet(Event(0.0), 0, 10)
    alignment.meet(Event(1e9), 61 * SECOND, 61 * SECOND + 10)  # the host slept, and its clock did not
    soon = alignment.place(Event(1.5e9), 61 * SECOND + 20)
    assert SECOND < soon <= 1.51 * SECOND


def test_what_began_before_all_that_is_remembered_keeps_the_time_of_its_launch() -> None:
    alignment = Alignment()
    alignment.meet(Event(0.0), SECOND, SECOND + 10)
    assert alignment.place(Event(5.0), 17) == 17
