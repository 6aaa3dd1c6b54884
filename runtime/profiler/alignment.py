"""Which time of the host an event on a device happened at.

Host and device have clocks of their own, which drift apart by microseconds each second. Every second or so an event is
*met*: recorded on an idle stream while the host watches, so that its host time is known to within the watching. Between
such events times are interpolated: the mapping is continuous and never runs backwards, so that what is nested stays
nested. Nothing that has been placed is ever placed differently: an error found at a meeting is made good, little by
little, after it.

Distances are CUDA's, float32 milliseconds: they resolve 0.06 µs within a second, and 250 µs after an hour. So an event
is measured from the last meeting before it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Final, Protocol

SLEW_NS: Final = 10**9
"""How long making good an error takes."""
MOST_SLEW: Final = 0.01
"""How much faster or slower time may seem meanwhile."""
MOST_ANCHORS: Final = 3600
"""How many meetings are remembered: about an hour of them, for spans that last as long."""


class Timed(Protocol):
    """An event of a device that has completed."""

    def elapsed_time(self, later: Any) -> float:
        """Milliseconds from this one to a later one."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Anchor:
    """An event that was met, and how time goes on after it."""

    event: Timed
    device_ns: int
    """Since the first one."""
    host_ns: int
    """What it is placed at."""
    met_ns: int
    """When the host knows that it had completed: what is launched later happens later."""
    slope: float
    """Host time per device time from here on, less 1."""


class Alignment:
    """The mapping. Not thread-safe."""

    def __init__(self) -> None:
        self._anchors: list[_Anchor] = []

    def meet(self, event: Timed, host_ns: int, met_ns: int) -> int:
        """An event of whose host time is known, later than any before. How far the mapping was off, in nanoseconds."""
        if not self._anchors:
            self._anchors.append(_Anchor(event=event, device_ns=0, host_ns=host_ns, met_ns=met_ns, slope=0.0))
            return 0
        last = self._anchors[-1]
        device_ns = last.device_ns + round(last.event.elapsed_time(event) * 1e6)
        placed_ns = self._host(device_ns)
        off = host_ns - placed_ns
        slope = min(max(off / SLEW_NS, -MOST_SLEW), MOST_SLEW)
        self._anchors.append(
            _Anchor(event=event, device_ns=device_ns, host_ns=placed_ns, met_ns=met_ns, slope=slope),
        )
        del self._anchors[:-MOST_ANCHORS]
        return off

    def place(self, event: Timed, launched_ns: int) -> int:
        """The host time of an event that was launched then."""
        assert self._anchors, "no event has been met"
        known = bisect_right(self._anchors, launched_ns, key=lambda anchor: anchor.met_ns)
        if known == 0:
            return launched_ns  # older than the oldest meeting that is remembered: not known any better
        anchor = self._anchors[known - 1]
        return self._host(anchor.device_ns + round(anchor.event.elapsed_time(event) * 1e6))

    def _host(self, device_ns: int) -> int:
        known = bisect_right(self._anchors, device_ns, key=lambda anchor: anchor.device_ns)
        anchor = self._anchors[max(known - 1, 0)]
        distance = device_ns - anchor.device_ns
        return anchor.host_ns + distance + round(distance * anchor.slope)
