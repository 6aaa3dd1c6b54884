"""Curves: exact at their points, between neighbours elsewhere, level beyond, refused where they mean nothing."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.errors import UsageError
from penstock.scheduler.curves import Curve

positive = st.floats(min_value=1e-6, max_value=1e15)
points = st.dictionaries(positive, positive, min_size=1, max_size=12)


def same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)


@given(points)
def test_exact_at_its_points(found: dict[float, float]) -> None:
    curve = Curve.through(found.items())
    assert all(same(curve.at(x), y) for x, y in found.items())
    assert curve.best == max(found.values())


@given(points, positive)
def test_between_its_neighbours(found: dict[float, float], x: float) -> None:
    curve = Curve.through(found.items())
    below = [each for each in curve.x if each <= x]
    above = [each for each in curve.x if each >= x]
    near = [found[each] for each in (below[-1:] + above[:1])]
    assert min(near) * (1 - 1e-9) <= curve.at(x) <= max(near) * (1 + 1e-9)


@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=8), positive, positive)
def test_monotone_where_its_points_are(pairs: list[tuple[float, float]], a: float, b: float) -> None:
    xs = sorted({x for x, _ in pairs})
    ys = sorted(y for _, y in pairs)[: len(xs)]
    rising = Curve(x=tuple(xs), y=tuple(ys))
    low, high = sorted((a, b))
    assert rising.at(low) <= rising.at(high) * (1 + 1e-9)
    falling = Curve(x=tuple(xs), y=tuple(reversed(ys)))
    assert falling.at(low) * (1 + 1e-9) >= falling.at(high)


@given(points, st.floats(min_value=1.0, max_value=1e6))
def test_level_beyond_its_ends(found: dict[float, float], factor: float) -> None:
    curve = Curve.through(found.items())
    assert same(curve.at(curve.x[0] / factor), curve.y[0])
    assert same(curve.at(curve.x[-1] * factor), curve.y[-1])


@given(points, positive, st.floats(min_value=1e-3, max_value=1e3))
def test_scaling(found: dict[float, float], x: float, factor: float) -> None:
    curve = Curve.through(found.items())
    assert math.isclose(curve.scaled(factor).at(x), factor * curve.at(x), rel_tol=1e-6)


def test_a_power_law_between_two_points() -> None:
    curve = Curve(x=(1.0, 100.0), y=(1.0, 10.0))
    assert curve.at(10) == pytest.approx(math.sqrt(10))
    assert Curve.flat(7.0).at(1e9) == 7.0


@pytest.mark.parametrize(
    "fields",
    [
        {"x": [], "y": []},
        {"x": [1.0], "y": [1.0, 2.0]},
        {"x": [2.0, 1.0], "y": [1.0, 1.0]},
        {"x": [1.0, 1.0], "y": [1.0, 1.0]},
        {"x": [0.0], "y": [1.0]},
        {"x": [1.0], "y": [-1.0]},
        {"x": [1.0], "y": [1.0], "spread": [0.1, 0.1]},
        {"x": [1.0], "y": [1.0], "spread": [-0.1]},
    ],
)
def test_what_is_no_curve_is_refused(fields: dict[str, list[float]]) -> None:
    with pytest.raises(UsageError):
        Curve(**{name: tuple(values) for name, values in fields.items()})
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode(fields), type=Curve)
