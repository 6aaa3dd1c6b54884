"""How much of what is in host memory crosses the link to the device, learned from what both sides take.

`split.py` says what is best for given rates. These are seen here as a run goes: who attends on the CPU is timed; of
what crosses the link the time is seen when somebody waited for it, and else only that it was not slower: then more of
it crosses the next time. In the first calls both sides get something, so that both rates are known; later ones follow
the split. The CPU's rate depends on how many queries use each key, so what is learned is kept by that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .split import ColdBlocks, KvRates, split

FIRST: Final = 4
"""Calls in which both sides get something, whatever is known."""
WEIGHT: Final = 0.3
"""Of what was seen last, in what is known."""
HOPE: Final = 1.15
"""Where the link was not waited for it may be so much faster than is known: it gets more, until somebody waits."""
DOUBT: Final = 1.02
"""What a wait has shown is doubted by so much per call without one: the link may have become faster since."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What one call took."""

    cpu_nbytes: int
    cpu_s: float
    link_nbytes: int
    link_s: float
    """Until the last of it had arrived, as far as that is known."""
    waited: bool
    """Whether the CPU had ended by then, so that `link_s` is what the link took."""


@dataclass(kw_only=True, slots=True)
class _Known:
    calls: int = 0
    cpu: float | None = None
    """Bytes per second."""
    link: float | None = None
    shown: float | None = None
    """What the link gave when it was waited for: hope goes beyond it once, not again and again, since a call with too
    much for the link is a long one."""


class Balance:
    """Shares cold pieces between the CPU and the link."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        """By the power of two of queries per key."""

    def to_cross(self, queries: int, *, pieces: int, nbytes: int) -> int:
        """How many of so many pieces, `nbytes` in all, are to cross the link when so many queries use each key."""
        if not pieces:
            return 0
        known = self._of(queries)
        if known.cpu is None or known.link is None:
            return pieces // 2 if known.calls % 2 == 0 else -(-pieces // 2)  # a single piece goes to each in turn
        cold = ColdBlocks(host=pieces, block_nbytes=max(1, nbytes // pieces))
        best = split(cold, KvRates(cpu=known.cpu, link=known.link)).link_blocks
        return max(1, min(best, pieces - 1)) if known.calls < FIRST and pieces > 1 else best

    def hear(self, queries: int, seen: Seen) -> None:
        """What a call took that was shared like this."""
        known = self._of(queries)
        known.calls += 1
        if seen.cpu_nbytes and seen.cpu_s > 0:
            known.cpu = _towards(known.cpu, seen.cpu_nbytes / seen.cpu_s)
        if seen.link_nbytes and seen.link_s > 0:
            rate = seen.link_nbytes / seen.link_s
            if seen.waited:
                known.link = known.shown = _towards(known.shown, rate)
                return
            known.link = max(known.link or 0.0, rate) * HOPE
            if known.shown is not None:
                known.shown *= DOUBT
                known.link = min(known.link, max(known.shown, rate) * HOPE)

    def rates(self, queries: int) -> tuple[float | None, float | None]:
        """Bytes per second of the CPU and of the link, as far as they are known."""
        known = self._of(queries)
        return known.cpu, known.link

    def _of(self, queries: int) -> _Known:
        return self._known.setdefault(queries.bit_length(), _Known())


def _towards(known: float | None, seen: float) -> float:
    return seen if known is None else known + WEIGHT * (seen - known)
