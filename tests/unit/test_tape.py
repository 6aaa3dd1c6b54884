"""The tape: its peak against the slow way, replayed over every instant."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.scheduler.sizes import KINDS, Bytes
from penstock.scheduler.tape import Tape


def test_peak_is_the_instant_at_which_most_is_held() -> None:
    tape = Tape()
    weight = tape.take(10)
    early = tape.take(5)
    tape.give(early)
    late = tape.take(7, "layers.*")
    tape.mark([weight], "activations")
    tape.mark([late], "gradients")
    tape.give(weight)
    tape.take(2)
    assert tape.peak() == Bytes(activations=10, gradients=7)
    assert tape.peak(before="gradients") == Bytes(activations=10, workspace=5)
    assert tape.held("gradients") == {"layers.*": 7}
    assert tape.held("activations") == {}
    assert Tape().peak() == Bytes()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50), st.sampled_from(KINDS)), max_size=30))
def test_peak_against_a_replay(turns: list[tuple[int, int, str]]) -> None:
    tape = Tape()
    held: dict[int, tuple[int, str]] = {}
    highest = 0
    for choice, nbytes, kind in turns:
        if choice < 6 or not held:
            number = tape.take(nbytes)
            tape.mark([number], kind)  # type: ignore[list-item]
            held[number] = (nbytes, kind)
        else:
            number = sorted(held)[choice % len(held)]
            tape.give(number)
            del held[number]
        highest = max(highest, sum(size for size, _ in held.values()))
    assert tape.peak().total == highest
    assert tape.live() == sorted(held)
