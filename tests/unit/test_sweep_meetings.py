"""Members of a sweep who meet: one does it for all, once per place and sweep, and everybody gets what is theirs."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sweep import FakeExecutor

from penstock.runtime.sweep import StoppedError, Sweep

PLACES = (0, 2, 2)
"""One before block 1, two between 2 and 3."""
WHOLE: tuple[str, ...] = ("place 0", "block 1", "block 2", "place 1", "place 2", "block 3")


class Company:
    """Members in threads, and who met where."""

    def __init__(self, programs: Sequence[Sequence[Sequence[str]]], *, resident: int = 100, fails: int = -1) -> None:
        self.executor = FakeExecutor()
        self.met: list[tuple[int, int, list[tuple[int, int]]]] = []
        """Sweep, place, and (member, call) of all who were there."""
        self.ends: list[BaseException | None] = [None] * len(programs)
        self._fails = fails
        self.sweep = Sweep(
            self.executor,  # type: ignore[arg-type]
            members=range(len(programs)),
            resident=lambda block: block >= resident,
            computed=lambda: None,
            places=PLACES,
        )
        threads = [threading.Thread(target=self._work, args=each) for each in enumerate(programs)]
        for thread in threads:
            thread.start()
        self.sweep.start()
        for thread in threads:
            thread.join(timeout=30)
            assert not thread.is_alive(), "a member waits for ever"
        assert not +self.executor.held, "a lease was kept"

    def _work(self, member: int, calls: Sequence[Sequence[str]]) -> None:
        try:
            with self.sweep.taking_part(member):
                for call, steps in enumerate(calls):
                    self.sweep.begin(0)
                    failed = True
                    try:
                        for step in steps:
                            self._step(member, call, step)
                        failed = False
                    finally:
                        self.sweep.end(failed=failed)
        except BaseException as error:
            self.ends[member] = error

    def _step(self, member: int, call: int, step: str) -> None:
        kind, number = step.split()
        if kind == "block":
            self.sweep.release(self.sweep.acquire(int(number)))
            return

        def compute(given: Sequence[tuple[int, int]]) -> list[str]:
            if len(self.met) == self._fails:
                raise ValueError("the drive is gone")
            self.met.append((self.sweep.ended, int(number), list(given)))
            return [f"for {one} in its call {other}" for one, other in given]

        assert self.sweep.meet(int(number), (member, call), compute) == f"for {member} in its call {call}"


@settings(max_examples=30)
@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=5), resident=st.sampled_from([0, 2, 100]))
def test_all_of_a_sweep_meet_once_at_each_place(counts: list[int], resident: int) -> None:
    """Wherever blocks are: where all of them stay, nothing else would have one member wait for another."""
    company = Company([[WHOLE] * count for count in counts], resident=resident)
    assert company.ends == [None] * len(counts)
    assert [(sweep, place) for sweep, place, _ in company.met] == [
        (sweep, place) for sweep in range(max(counts)) for place in range(3)
    ]
    for sweep, _, there in company.met:
        assert sorted(there) == [(member, sweep) for member, count in enumerate(counts) if count > sweep]


@settings(max_examples=30)
@given(members=st.integers(1, 5), seed=st.integers(0, 1000))
def test_who_does_not_come_is_not_waited_for(members: int, seed: int) -> None:
    draw = random.Random(seed)
    programs = [[[step for step in WHOLE if draw.random() < 0.6] for _ in range(3)] for _ in range(members)]
    company = Company(programs)
    assert company.ends == [None] * members
    found = sorted((place, member, call) for _, place, there in company.met for member, call in there)
    expected = [
        (int(step.split()[1]), member, call)
        for member, calls in enumerate(programs)
        for call, steps in enumerate(calls)
        for step in steps
        if step.startswith("place")
    ]
    assert found == sorted(expected)
    assert len({(sweep, place) for sweep, place, _ in company.met}) == len(company.met)


@pytest.mark.parametrize("fails", [0, 2, 4])
def test_what_fails_is_told_by_one_and_stops_the_others(fails: int) -> None:
    company = Company([[WHOLE] * 2] * 3, fails=fails)
    assert sorted(type(end).__name__ for end in company.ends) == ["StoppedError", "StoppedError", "ValueError"]
    assert sum(isinstance(end, StoppedError) for end in company.ends) == 2
    assert company.executor.failures == 1
