"""A measured figure as a function of one other: a rate by request size, by rows, by threads."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable

import msgspec

from ..memory.errors import UsageError


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """Points, joined by straight lines on logarithmic axes, and level beyond the first and the last.

    Rates of hardware rise along powers and then level off: between two points a power law is the best guess there is.
    """

    x: tuple[float, ...]
    """Ascending, above 0. What it is, and its unit, is said where the curve is a field."""
    y: tuple[float, ...]
    """Above 0."""
    spread: tuple[float, ...] = ()
    """By point: (highest - lowest) / median of what was measured there. Empty where nothing was: a data sheet."""

    def __post_init__(self) -> None:
        if not self.x or len(self.x) != len(self.y) or len(self.spread) not in (0, len(self.x)):
            raise UsageError(
                f"a curve needs as many x as y, one at least, and as many spreads or none: it has "
                f"{len(self.x)}, {len(self.y)} and {len(self.spread)}"
            )
        if any(b <= a for a, b in zip(self.x, self.x[1:], strict=False)):
            raise UsageError(f"the x of a curve must ascend: {', '.join(map(str, self.x))}")
        for value in (*self.x, *self.y):
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"a curve holds {value}, which is no rate: all its x and y must be above 0")
        if any(not math.isfinite(each) or each < 0 for each in self.spread):
            raise UsageError("the spreads of a curve must be 0 or more")

    @classmethod
    def flat(cls, y: float) -> Curve:
        """The same everywhere."""
        return cls(x=(1.0,), y=(y,))

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]]) -> Curve:
        """Through points (x, y), in any order."""
        ordered = sorted(points)
        return cls(x=tuple(x for x, _ in ordered), y=tuple(y for _, y in ordered))

    def at(self, x: float) -> float:
        """The value at `x`, which is above 0."""
        after = bisect_right(self.x, x)
        if after == 0:
            return self.y[0]
        if after == len(self.x):
            return self.y[-1]
        low, high = self.x[after - 1], self.x[after]
        share = math.log(x / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(self.y[after - 1]) + share * math.log(self.y[after]))

    def onward(self, x: float) -> float:
        """The same of a rate that arithmetic bounds beyond the last point: the power law of the last two points goes on
        where it falls, but no faster than 1 / x. With one point it is level.

        A row more takes no more time than the rows before it took on average, and at least none.
        """
        if x <= self.x[-1] or len(self.x) == 1:
            return self.at(x)
        power = math.log(self.y[-1] / self.y[-2]) / math.log(self.x[-1] / self.x[-2])
        return float(self.y[-1] * (x / self.x[-1]) ** min(max(power, -1.0), 0.0))

    @property
    def best(self) -> float:
        """The highest value measured."""
        return max(self.y)

    def scaled(self, factor: float) -> Curve:
        """All values times `factor`."""
        return msgspec.structs.replace(self, y=tuple(value * factor for value in self.y))
