"""How much the CPU computes while others go on on the device, in sweeps of several micro-batches.

A block that stays in host memory is copied once per sweep and then computed on the device for each micro-batch; or it
is computed by the CPU, where it lies, for each of them. The device, the CPU, the link and the drives work at the same
time. Micro-batches follow each other closely: while one is in a part on the CPU, the next one is in the stretch before
it on the device, and then the first one in the stretch behind. So of two that meet the longer one counts, part by part;
and whatever is at the end of a model, and on one processor, has nothing beside it. Each time that a micro-batch goes to
the CPU and comes back, it costs both processors what handing over takes; and the device goes from one micro-batch to
the next at each block that is copied.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from .cost import CostModel
from .processors import GAIN, Candidate, Traffic, at_rows, crossing_s, held_up_s

STEPS: Final = 16
"""Shares of the parts that are tried, evenly spaced."""
ROUNDING: Final = 1e-9
"""Of a sum of shares that are all of something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What the CPU computes as a whole: a layer, or a matrix of one."""

    blocks: tuple[Candidate, ...]
    rows_below: int
    """Calls of fewer rows are computed there."""
    keys: float = 0.0
    """The part of a cache whose keys and values are in host memory then: of the layers that attend in it."""

    @property
    def nbytes(self) -> float:
        """Of its weights."""
        return sum(block.nbytes for block in self.blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A choice, and what it takes."""

    cpu_share: float
    """The part, by bytes, of what the CPU can compute that it does compute; 0 where one processor computes."""
    seconds: float
    """Of a sweep."""
    keys: float = 0.0
    """The part of the keys and values that is in host memory then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Busy:
    """Seconds for which a part keeps each busy: the processors with one micro-batch, the link with all of them."""

    device_s: float
    cpu_s: float
    copied_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Passage:
    """Seconds of a sweep: of one micro-batch that passes through, and what each further one adds."""

    first_s: float
    each_s: float
    both_s: float
    """What both processors work for a micro-batch, one after the other."""
    copied_s: float
    keys: float


def spread(nbytes: Sequence[float], share: float) -> list[int]:
    """Which of some parts, in the order of use, make up a share of all bytes: whole ones, spread evenly."""
    found: list[int] = []
    owed = 0.0
    for place, size in enumerate(nbytes):
        owed += share * size
        if 0 < size <= 2 * owed:
            found.append(place)
            owed -= size
    return found


class Alternation:
    """Chooses for one model on one machine.

    Args:
        costs: Of the machine.
        able: What the CPU can compute, in the order of use.
        others: All other blocks.
        copied_nbytes: Bytes of those that are copied per sweep.
        copied: Which they are.
        disk_s: Seconds that a sweep keeps the drives busy.
        link_rate: Bytes per second to the device; None where it is not known.
    """

    def __init__(
        self,
        costs: CostModel,
        *,
        able: Sequence[Part],
        others: Sequence[Candidate],
        copied_nbytes: float,
        copied: Collection[int],
        disk_s: float,
        link_rate: float | None,
    ) -> None:
        self._costs = costs
        self._able = able
        self._others = others
        self._copied_nbytes = copied_nbytes
        self._copied = copied
        self._disk_s = disk_s
        self._link_rate = link_rate
        self._between = self._stretches()
        self._busy = cache(self._of_part)
        self._elsewhere = cache(self._others_s)
        self._passage = cache(self._passing)

    def best(self, *, rows: int, lanes: int, most_keys: float = 1.0) -> Split:
        """The choice for so many rows in each of so many micro-batches: two processors where that saves GAIN or more.

        With one micro-batch there is nobody to go on meanwhile: what its processors take adds up.

        Args:
            most_keys: The part of the keys and values that host memory has room for.
        """
        one = self.of(0.0, rows=rows, lanes=lanes)
        tried = [self.of(step / STEPS, rows=rows, lanes=lanes) for step in range(1, STEPS + 1)]
        able = [split for split in tried if split.keys <= most_keys + ROUNDING and self._chosen(split.cpu_share, rows)]
        two = min(able, key=lambda split: split.seconds, default=one)
        return two if two.seconds <= (1 - GAIN) * one.seconds else one

    def of(self, share: float, *, rows: int, lanes: int) -> Split:
        """What a sweep takes in which the CPU computes this share of what it can."""
        passage = self._passage(share, rows, lanes > 1)
        computing = passage.first_s + (lanes - 1) * passage.each_s
        computing = max(computing, lanes * passage.both_s / self._costs.processors_at_once)
        return Split(cpu_share=share, seconds=max(self._disk_s, passage.copied_s, computing), keys=passage.keys)

    def _passing(self, share: float, rows: int, together: bool) -> _Passage:
        """One micro-batch, alone or followed by others: stretches on the device, and parts on the CPU between them.

        The stretch before a part meets the part of who is ahead, and the part meets the stretch behind it.
        """
        chosen, costs = self._chosen(share, rows), self._costs
        switch_s = costs.switch_s if together else 0.0
        copied_s, keys, both_s = self._copied_s(self._copied_nbytes), 0.0, 0.0
        first_s, each_s, part_s = 0.0, 0.0, 0.0  # part_s: of the part before the stretch
        device_s = host_s = 0.0
        for place, (others_s, turns) in enumerate(self._elsewhere(rows)):
            device_s += others_s
            host_s += turns * switch_s
            if place == len(self._able):
                break
            busy, part = self._busy(place, rows), self._able[place]
            if place not in chosen:
                device_s += busy.device_s
                host_s += len(part.blocks) * switch_s
                copied_s += busy.copied_s
                continue
            stretch_s = self._on_device_s(device_s, host_s + costs.hand_over_s)
            both_s += stretch_s + busy.cpu_s
            first_s += max(part_s, stretch_s)
            each_s += max(stretch_s, busy.cpu_s)
            keys += part.keys
            part_s, device_s, host_s = busy.cpu_s, 0.0, 0.0
        stretch_s = self._on_device_s(device_s, host_s)
        both_s += stretch_s
        if not together:
            return _Passage(first_s=both_s, each_s=both_s, both_s=both_s, copied_s=copied_s, keys=keys)
        return _Passage(
            first_s=first_s + max(part_s, stretch_s),
            each_s=each_s + stretch_s,
            both_s=both_s,
            copied_s=copied_s,
            keys=keys,
        )

    def _on_device_s(self, device_s: float, host_s: float) -> float:
        """What the device works, and its host beside: who hands it on has given it work to do meanwhile."""
        return device_s + host_s if self._costs.hardware.emulated else max(device_s, host_s)

    def _chosen(self, share: float, rows: int) -> frozenset[int]:
        """The parts that make up a share, less those that the CPU does not compute for so many rows."""
        places = spread([part.nbytes for part in self._able], share)
        return frozenset(place for place in places if rows < self._able[place].rows_below)

    def _of_part(self, place: int, rows: int) -> _Busy:
        part = self._able[place]
        traffic = Traffic(copying=True, reading=self._disk_s > 0)
        on_cpu = sum(held_up_s(block, self._costs, rows, traffic) for block in part.blocks)
        crossing = max((crossing_s(block, self._costs, rows) for block in part.blocks), default=0.0)
        return _Busy(
            device_s=self._on_device(part.blocks, rows),
            cpu_s=on_cpu + crossing + self._costs.hand_over_s,
            copied_s=self._copied_s(part.nbytes),
        )

    def _stretches(self) -> list[list[Candidate]]:
        """All other blocks: those before each part, in the order of use, and those behind the last."""
        found: list[list[Candidate]] = [[] for _ in range(len(self._able) + 1)]
        ends = [part.blocks[0].block if part.blocks else -1 for part in self._able]
        for candidate in self._others:
            found[bisect_left(ends, candidate.block)].append(candidate)
        return found

    def _others_s(self, rows: int) -> list[tuple[float, int]]:
        """By stretch: what its blocks take on the device, and how many of them are copied."""
        return [
            (self._on_device(stretch, rows), sum(candidate.block in self._copied for candidate in stretch))
            for stretch in self._between
        ]

    def _on_device(self, candidates: Iterable[Candidate], rows: int) -> float:
        operations = [at_rows(operation, rows) for candidate in candidates for operation in candidate.operations]
        return self._costs.compute_s(operations, "gpu")

    def _copied_s(self, nbytes: float) -> float:
        return nbytes / self._link_rate if self._link_rate else 0.0
