"""How much the CPU computes while others go on on the device, in sweeps of several micro-batches.

A block that stays in host memory is copied once per sweep and then computed on the device for each micro-batch; or it
is computed by the CPU, where it lies, for each of them. The device, the CPU, the link and the drives work at the same
time, and a sweep takes as long as the busiest of them. So the CPU is given the part of the blocks with which that is
least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from .cost import CostModel
from .processors import GAIN, Candidate, Traffic, at_rows, cpu_s

STEPS: Final = 16
"""Parts of the blocks that are tried, evenly spaced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A choice, and what it takes."""

    cpu_share: float
    """The part, by bytes, of what the CPU can compute that it does compute; 0 where one processor computes."""
    seconds: float
    """Of a sweep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Busy:
    """Seconds of a sweep in which one micro-batch keeps a processor busy, and the link for all of them."""

    elsewhere_s: float
    """The device, with what it computes in any case."""
    device_s: float
    """The device, with what the CPU can compute."""
    cpu_s: float
    copied_s: float
    """The link, with the same blocks."""
    other_copied_s: float


class Alternation:
    """Chooses for one model on one machine.

    Args:
        costs: Of the machine.
        able: Blocks that the CPU can compute, each with the number of rows from which on the device computes it.
        others: All other blocks.
        copied_nbytes: Bytes of those that are copied per sweep.
        disk_s: Seconds that a sweep keeps the drives busy.
        link_rate: Bytes per second to the device; None where it is not known.
    """

    def __init__(
        self,
        costs: CostModel,
        *,
        able: Sequence[tuple[Candidate, int]],
        others: Sequence[Candidate],
        copied_nbytes: float,
        disk_s: float,
        link_rate: float | None,
    ) -> None:
        self._costs = costs
        self._able = able
        self._others = others
        self._copied_nbytes = copied_nbytes
        self._disk_s = disk_s
        self._link_rate = link_rate
        self._busy = cache(self._measure)

    def best(self, *, rows: int, lanes: int) -> Split:
        """The choice for so many rows in each of so many micro-batches: two processors where that saves GAIN or more.

        With one micro-batch there is nobody to go on meanwhile: what its processors take adds up.
        """
        one = self._seconds(rows, lanes, 0.0)
        shares = [step / STEPS for step in range(1, STEPS + 1)]
        share = min(shares, key=lambda each: self._seconds(rows, lanes, each))
        two = self._seconds(rows, lanes, share)
        if two <= (1 - GAIN) * one and self._busy(rows).cpu_s:
            return Split(cpu_share=share, seconds=two)
        return Split(cpu_share=0.0, seconds=one)

    def _seconds(self, rows: int, lanes: int, share: float) -> float:
        busy = self._busy(rows)
        device = lanes * (busy.elsewhere_s + (1 - share) * busy.device_s)
        cpu = lanes * share * busy.cpu_s
        link = busy.other_copied_s + (1 - share) * busy.copied_s
        computing = max(device, cpu) if lanes > 1 else device + cpu
        return max(self._disk_s, link, computing)

    def _measure(self, rows: int) -> _Busy:
        able = [candidate for candidate, below in self._able if rows < below]
        unable = [candidate for candidate, below in self._able if rows >= below]
        traffic = Traffic(copying=True, reading=self._disk_s > 0)
        return _Busy(
            elsewhere_s=self._on_device(self._others, rows) + self._on_device(unable, rows),
            device_s=self._on_device(able, rows),
            cpu_s=sum(cpu_s(candidate, self._costs, rows, traffic) for candidate in able),
            copied_s=self._copied(sum(candidate.nbytes for candidate in able)),
            other_copied_s=self._copied(self._copied_nbytes + sum(candidate.nbytes for candidate in unable)),
        )

    def _on_device(self, candidates: Sequence[Candidate], rows: int) -> float:
        operations = [at_rows(operation, rows) for candidate in candidates for operation in candidate.operations]
        return self._costs.compute_s(operations, "gpu")

    def _copied(self, nbytes: float) -> float:
        return nbytes / self._link_rate if self._link_rate else 0.0
