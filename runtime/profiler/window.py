"""The stretch of time that figures are about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...memory.errors import UsageError
from .intervals import Ints, Mask
from .profile import Columns, Profile
from .schema import Step

STEADY_STEPS = 3
"""From so many steps on, the first one (cold caches, orders being learned, states being made) is left out."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """[start, end), nanoseconds of the monotonic clock."""

    start: int
    end: int
    last: bool = False
    """Nothing was recorded after it: instants at its end belong to it."""

    @staticmethod
    def of(profile: Profile, bounds: tuple[int, int] | None = None) -> Window:
        """The window with these bounds; without any, the steady steps, or the whole run where they are too few.

        Raises UsageError for bounds that run backwards.
        """
        whole = Window.whole(profile)
        if bounds is None:
            steps = ended(profile[Step])
            if len(steps) < STEADY_STEPS:
                return whole
            order = np.argsort(steps.start, kind="stable")[1:]
            bounds = (int(steps.start[order].min()), int(steps.end[order].max()))
        start, end = bounds
        if end < start:
            raise UsageError(
                f"the window begins at {start} ns and ends at {end} ns, before it begins; the run was recorded "
                f"from {whole.start} ns to {whole.end} ns: give the earlier time first"
            )
        return Window(start=start, end=end, last=end >= whole.end)

    @staticmethod
    def whole(profile: Profile) -> Window:
        """Everything that was recorded."""
        first, last = profile.span()
        return Window(start=first, end=max(first, last), last=True)

    @property
    def length(self) -> int:
        """Nanoseconds."""
        return self.end - self.start

    def holds(self, at: Ints) -> Mask:
        """Which instants lie inside."""
        inside: Mask = (at >= self.start) & ((at <= self.end) if self.last else (at < self.end))
        return inside

    def inside(self, start: Ints, end: Ints) -> Ints:
        """How much of each span lies inside, in nanoseconds; 0 for spans that run backwards."""
        length: Ints = np.minimum(end, self.end) - np.maximum(start, self.start)
        return np.maximum(length, 0)

    def share(self, start: Ints, end: Ints) -> npt.NDArray[np.float64]:
        """Which share of each span lies inside: 0 or 1 of one without length, 0 of one that runs backwards."""
        length = end - start
        shares: npt.NDArray[np.float64] = self.inside(start, end) / np.maximum(length, 1)
        return np.where(length > 0, shares, (length == 0) & self.holds(start))

    def steps(self, profile: Profile) -> Columns:
        """The steps that lie wholly inside, by their start."""
        steps = ended(profile[Step])
        steps = steps.where((steps.start >= self.start) & (steps.end <= self.end))
        return steps.where(np.argsort(steps.start, kind="stable"))


def ended(steps: Columns) -> Columns:
    """Those that ended; one that an error cut short may have no end."""
    return steps.where(steps.end >= steps.start)
