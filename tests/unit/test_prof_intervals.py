"""Sets of intervals against bitmaps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from penstock.runtime.profiler.intervals import Intervals

SPAN = 40
Pairs = list[tuple[int, int]]
pairs = st.lists(st.tuples(st.integers(0, SPAN), st.integers(0, SPAN)), max_size=12)
points = st.lists(st.integers(-3, SPAN + 3), max_size=12)


def bitmap(spans: Pairs) -> npt.NDArray[np.bool_]:
    found = np.zeros(SPAN, dtype=bool)
    for start, end in spans:
        found[start:end] = True
    return found


def union(spans: Pairs) -> Intervals:
    columns = np.array(spans, dtype=np.int64).reshape(-1, 2)
    return Intervals.union(columns[:, 0], columns[:, 1])


def drawn(found: Intervals) -> npt.NDArray[np.bool_]:
    """The bitmap of a set, whose form is checked on the way."""
    assert (found.start < found.end).all()
    assert (found.start[1:] > found.end[:-1]).all()  # in order, and nothing touches
    return bitmap(list(zip(found.start.tolist(), found.end.tolist(), strict=True)))


@given(pairs)
def test_a_union_covers_what_any_span_covers(spans: Pairs) -> None:
    found = union(spans)
    assert (drawn(found) == bitmap(spans)).all()
    assert found.length == int(bitmap(spans).sum())


@given(pairs, pairs)
def test_set_operations_agree_with_bitmaps(ours: Pairs, theirs: Pairs) -> None:
    a, b = union(ours), union(theirs)
    assert (drawn(a | b) == bitmap(ours) | bitmap(theirs)).all()
    assert (drawn(a & b) == bitmap(ours) & bitmap(theirs)).all()
    assert (drawn(a - b) == bitmap(ours) & ~bitmap(theirs)).all()
    assert a.shared(b) == b.shared(a) == (a & b).length == a.length - (a - b).length


@given(pairs, st.integers(-3, SPAN + 3), st.integers(-3, SPAN + 3))
def test_clipping_keeps_what_is_inside(spans: Pairs, start: int, end: int) -> None:
    keep = np.array([start <= instant < end for instant in range(SPAN)])
    assert (drawn(union(spans).clip(start, end)) == bitmap(spans) & keep).all()


@given(pairs, points)
def test_instants_are_found_and_what_lies_before_them_is_measured(spans: Pairs, at: list[int]) -> None:
    found, bits = union(spans), bitmap(spans)
    instants = np.array(at, dtype=np.int64)
    assert found.contains(instants).tolist() == [0 <= t < SPAN and bool(bits[t]) for t in at]
    assert found.before(instants).tolist() == [int(bits[: max(t, 0)].sum()) for t in at]


@given(pairs, points)
def test_cutting_changes_no_instant_and_leaves_no_point_inside_a_piece(spans: Pairs, at: list[int]) -> None:
    pieces = union(spans).cut(np.array(at, dtype=np.int64))
    assert (drawn(Intervals.union(pieces.start, pieces.end)) == bitmap(spans)).all()
    assert pieces.length == union(spans).length
    for start, end in zip(pieces.start.tolist(), pieces.end.tolist(), strict=True):
        assert not any(start < point < end for point in at)


def test_times_of_a_clock_that_has_run_for_years_are_exact() -> None:
    start = 3 * 10**17
    found = Intervals.union(np.array([start, start + 3]), np.array([start + 2, start + 4]))
    assert found.length == 3
    assert (Intervals.one(start, start + 10) - found).length == 7


def test_one_interval_may_be_empty() -> None:
    assert len(Intervals.one(5, 5)) == 0
    assert Intervals.one(5, 5).length == 0
    assert Intervals.one(5, 7).length == 2
