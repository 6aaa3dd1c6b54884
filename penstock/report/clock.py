"""The report's clock: nanoseconds since the first record, in ticks that fit 31 bits however long the run was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.profiler.profile import Column, Profile

_MOST_TICKS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Maps a profile's instants to ticks."""

    first_ns: int
    """The instant of tick 0, on the profile's clock."""
    tick_ns: int
    """1 for runs of up to two seconds; 280 for ten minutes."""
    ticks: int
    """Length of the run; at least 1."""

    @classmethod
    def of(cls, profile: Profile) -> Clock:
        """The clock that covers everything recorded."""
        first, last = profile.span()
        span = max(1, last - first)
        tick = -(-span // _MOST_TICKS)
        return cls(first_ns=first, tick_ns=tick, ticks=max(1, span // tick))

    def at(self, instants: Column) -> Column:
        """Instants (ns) as ticks, clipped to the run."""
        return np.clip((instants - self.first_ns) // self.tick_ns, 0, self.ticks)

    def spans(self, first: Column, last: Column) -> tuple[Column, Column]:
        """Starts and ends (ns) as ticks; a span that ends before it starts is empty."""
        start = self.at(first)
        return start, np.maximum(self.at(last), start)

    def describe(self) -> dict[str, Any]:
        """What the page needs to know of it."""
        return {"tick": self.tick_ns, "ticks": self.ticks}


def ranks(known: npt.NDArray[np.int64], numbers: Column) -> Column:
    """Where each number stands in a sorted array of known ones; -1 for those that are not in it."""
    if not known.size:
        return np.full(len(numbers), -1, dtype=np.int64)
    found = np.minimum(np.searchsorted(known, numbers), known.size - 1)
    return np.where(known[found] == numbers, found, -1)
