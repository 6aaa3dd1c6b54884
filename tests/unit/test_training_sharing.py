"""What training keeps in host memory: never more than there is room for, and more room never moves more bytes."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from penstock.scheduler.sharing import STATE_MOVES, Shares, share_out, spread

sizes = st.lists(st.integers(1, 60), max_size=12)


@st.composite
def demands(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "gradients": draw(sizes),
        "gradient_moves": draw(st.integers(STATE_MOVES, 9)),
        "states": draw(sizes),
        "passing_nbytes": draw(st.integers(0, 80)),
    }


def least(asked: dict[str, Any]) -> int:
    """Room that is there at least."""
    return min(sum(asked["gradients"]), asked["passing_nbytes"])


def taken(asked: dict[str, Any], shares: Shares) -> int:
    """What it takes, counted piece by piece."""
    found = sum(asked["gradients"][index] for index in shares.gradients)
    found += sum(asked["states"][index] for index in shares.states)
    return found + (asked["passing_nbytes"] if len(shares.gradients) < len(asked["gradients"]) else 0)


def moved(asked: dict[str, Any], shares: Shares) -> int:
    """What is not kept, counted piece by piece."""
    found = 0
    for index, nbytes in enumerate(asked["gradients"]):
        found += 0 if index in shares.gradients else nbytes * asked["gradient_moves"]
    for index, nbytes in enumerate(asked["states"]):
        found += 0 if index in shares.states else nbytes * STATE_MOVES
    return found


@given(demands(), st.integers(0, 900))
def test_it_takes_no_more_than_there_is(asked: dict[str, Any], more: int) -> None:
    room = least(asked) + more
    shares = share_out(room, **asked)
    assert shares.nbytes == taken(asked, shares) <= room
    assert shares.moved_nbytes == moved(asked, shares)


@given(demands(), st.integers(0, 900), st.integers(0, 200))
def test_more_room_never_moves_more(asked: dict[str, Any], room: int, more: int) -> None:
    room += least(asked)
    assert share_out(room + more, **asked).moved_nbytes <= share_out(room, **asked).moved_nbytes


@given(demands())
def test_room_for_everything_keeps_everything(asked: dict[str, Any]) -> None:
    room = sum(asked["gradients"]) + sum(asked["states"])
    assert share_out(room, **asked).moved_nbytes == 0


@given(demands(), st.integers(0, 900))
def test_gradients_come_before_states(asked: dict[str, Any], more: int) -> None:
    """What states have got would not have been enough for any gradient that is on disk."""
    room = least(asked) + more
    shares = share_out(room, **asked)
    left = room - shares.nbytes + sum(asked["states"][index] for index in shares.states)
    on_disk = [nbytes for index, nbytes in enumerate(asked["gradients"]) if index not in shares.gradients]
    assert all(nbytes > left for nbytes in on_disk)


def test_what_is_kept_is_spread_evenly() -> None:
    assert list(spread(8)) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert list(spread(5)) == [0, 4, 2, 1, 3]
    assert list(spread(1)) == [0]
    assert list(spread(0)) == []
    shares = share_out(40, gradients=[10] * 8, gradient_moves=2, states=[], passing_nbytes=0)
    assert shares.gradients == {0, 2, 4, 6}
