"""Where the activations of a step go: kept, to host memory, to disk, or made again from the input of their layer.

What a byte of room is worth is what it saves to compute (Fuyou, LoHan: Huang et al., 2024): of each layer there are
choices of results to hold, the best first (`recomputing.py`). Room is given out in that order over all layers, the
fastest tier first. What does not move anything is kept whenever it has room; what moves has to make the step shorter:
time is the largest of computing, with what is made again, and of each lane that bytes take, with what it carries
anyway. So nothing ever goes over a lane, or to a drive, that is itself the bound. Where the processor that computes
carries the bytes itself (a CPU copies, sums up, submits), that is computing as well: then moving them has to cost it
less than making them again.

The last one that a tier has room for is split there, as MEMO (Zhao et al., 2024) splits by tokens: the rest of its
bytes goes to the next tier. None is split between memory and making it again: a product of fewer rows has other last
bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isinf
from typing import Final, Literal

Place = Literal["keep", "host", "disk"]
GRAIN: Final = 4096
"""Bytes that parts are multiples of: a page, but for the end of what is split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """Results of a forward that are held together, for backward or for making others again."""

    nbytes: int
    seconds: float
    """Of computing, that are saved when they are there; infinite: they cannot be made again."""
    after: int | None = None
    """The one, by its place, that has to be held before this one saves anything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """What bytes pass on the way to a tier and back: a link in one direction, or a drive."""

    busy_s: float
    """Seconds of a pass that it is busy with everything else."""
    byte_s: float
    """Seconds that a byte of activations takes of it, there and back where both ways are one lane."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """A place for activations."""

    place: Place
    room_nbytes: float
    """For all that backward has not used yet; infinite where it is not known."""
    lanes: tuple[str, ...] = ()
    """That bytes pass on the way there; none where nothing moves."""
    processor_byte_s: float = 0.0
    """Seconds that a byte, there and back, takes of the processor that computes: 0 where others carry it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One forward and its backward, on a machine."""

    saved: Sequence[Saved]
    """In the order of forward."""
    tiers: Sequence[Tier]
    """The fastest first."""
    lanes: Mapping[str, Lane] = field(default_factory=dict)
    compute_s: float
    """Of forward and backward, when nothing is made again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Bytes of one that go to one place; parts of one follow each other."""

    place: Place
    nbytes: int


Parts = tuple[Part, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The decision."""

    parts: Mapping[int, Parts]
    """By place in `Pass.saved`. What is missing is made again."""
    seconds: float
    """Of the pass."""
    plain_s: float
    """The same with all made again that can be."""
    again_s: float
    """Of it, in which results are made a second time."""
    carrying_s: float
    """Of it, that the processor which computes carries bytes."""
    beyond_nbytes: int
    """What no tier has room for and cannot be made again: it is kept all the same."""

    def nbytes_at(self, place: Place) -> int:
        """Bytes that go to a place."""
        return sum(part.nbytes for parts in self.parts.values() for part in parts if part.place == place)


def place_activations(work: Pass) -> Placement:
    """Decide for one pass. Takes time in proportion to tensors times tiers."""
    return _Placing(work).placement()


class _Placing:
    """One decision on its way."""

    def __init__(self, work: Pass) -> None:
        self._work = work
        self._room = {tier.place: tier.room_nbytes for tier in work.tiers}
        self._lanes_of = {tier.place: tier.lanes for tier in work.tiers}
        self._carrying_of = {tier.place: tier.processor_byte_s for tier in work.tiers}
        self._lane_s = {name: lane.busy_s for name, lane in work.lanes.items()}
        self._parts: dict[int, Parts] = {}
        self._beyond = 0
        self._carrying = 0.0
        self._again = sum(each.seconds for each in work.saved if not isinf(each.seconds))
        self._plain_s = self._seconds(self._again, {})

    def placement(self) -> Placement:
        """All of it: what has no choice, and then what saves most per byte."""
        saved = self._work.saved
        last_first = range(len(saved) - 1, -1, -1)  # what is made last is used first, and has the least time to return
        for index in last_first:
            if isinf(saved[index].seconds):
                self._must(index)
        found = [index for index in range(len(saved)) if 0 < saved[index].seconds < inf]
        for index in sorted(found, key=self._worth, reverse=True):
            before = saved[index].after
            if before is None or before in self._parts:
                self._may(index)
        return Placement(
            parts=self._parts,
            seconds=self._seconds(self._again, {}),
            plain_s=self._plain_s,
            again_s=max(self._again, 0.0),
            carrying_s=self._carrying,
            beyond_nbytes=self._beyond,
        )

    def _worth(self, index: int) -> tuple[float, int, int]:
        """Sorts by what a byte saves, then by the chain that it is of, the last first, and in a chain by order."""
        each = self._work.saved[index]
        first = index
        while (before := self._work.saved[first].after) is not None:
            first = before
        return each.seconds / max(each.nbytes, 1), first, -index

    def _must(self, index: int) -> None:
        """Place what cannot be made again: where it makes the pass longest the least, in the fastest such tier."""
        nbytes = self._work.saved[index].nbytes
        found = [parts for parts in self._ways(nbytes) if parts is not None]
        if not found:
            self._beyond += nbytes
            self._take(index, (Part(place="keep", nbytes=nbytes),), 0.0)
            return
        self._take(index, min(found, key=lambda parts: self._seconds(self._again, _moved(parts))), 0.0)

    def _may(self, index: int) -> None:
        """Place one if that is worth it: it is kept, or the pass becomes shorter."""
        each = self._work.saved[index]
        now = self._seconds(self._again, {})
        for parts in self._ways(each.nbytes):
            if parts is None:
                continue
            moved = _moved(parts)
            stays = all(not self._lanes_of[place] for place in moved)
            if stays or self._seconds(self._again - each.seconds, moved) < now:
                self._take(index, parts, each.seconds)
                return

    def _ways(self, size: int) -> Iterable[Parts | None]:
        """Ways to place so many bytes: from each tier on; None for one without room."""
        places = [tier.place for tier in self._work.tiers]
        for first in range(len(places)):
            yield self._fill(size, places[first:])

    def _fill(self, size: int, places: Sequence[Place]) -> Parts | None:
        left, parts = size, []
        for place in places:
            room = self._room[place]
            take = left if room >= left else int(room) // GRAIN * GRAIN
            if take > 0:
                parts.append(Part(place=place, nbytes=take))
                left -= take
        return None if left else tuple(parts)

    def _take(self, index: int, parts: Parts, seconds: float) -> None:
        self._parts[index] = parts
        for part in parts:
            if part.place in self._room:
                self._room[part.place] = max(0, self._room[part.place] - part.nbytes)
        moved = _moved(parts)
        for name, more in self._more(moved).items():
            self._lane_s[name] += more
        self._carrying += self._carried_s(moved)
        self._again -= seconds

    def _seconds(self, again_s: float, moved: Mapping[Place, int]) -> float:
        """Of the pass, with so much made again and so many bytes more on their ways."""
        more = self._more(moved)
        compute = self._work.compute_s + max(again_s, 0.0) + self._carrying + self._carried_s(moved)
        return max([compute, *(seconds + more.get(name, 0.0) for name, seconds in self._lane_s.items())])

    def _carried_s(self, moved: Mapping[Place, int]) -> float:
        return sum(nbytes * self._carrying_of.get(place, 0.0) for place, nbytes in moved.items())

    def _more(self, moved: Mapping[Place, int]) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for place, nbytes in moved.items():
            for name in self._lanes_of.get(place, ()):
                found[name] += nbytes * self._work.lanes[name].byte_s
        return found


def _moved(parts: Parts) -> dict[Place, int]:
    found: dict[Place, int] = defaultdict(int)
    for part in parts:
        found[part.place] += part.nbytes
    return found
