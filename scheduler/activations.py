"""Where the activations of a step go: kept, to host memory, to disk, or made again from the input of their layer.

What a byte of room is worth is what it saves to compute: the product of a layer saves twice its inner dimension of
operations per element, a sum of two saves one (Fuyou, LoHan: Huang et al., 2024). So room is given out in that order,
the fastest tier first. What does not move anything is kept whenever it has room; what moves has to make the step
shorter: time is the largest of computing, with what is made again, and of each lane that bytes take, with what it
carries anyway. Computing is all that falls, so nothing ever goes over a lane, or to a drive, that is itself the bound.

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
    """What one operation of a forward leaves for backward."""

    segment: int
    """The part of the model that would run again for it, by its place in forward."""
    nbytes: int
    flops: float
    """Operations that are saved when it is there, should the segment run again; infinite: it cannot be made again."""
    product: bool = False
    """Whether it is the result of a product with weights: of two that save as much per byte, it goes first."""


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
    flops_per_s: float
    """That the processor does when it makes something again."""
    rest_flops: Mapping[int, float] = field(default_factory=dict)
    """By segment: operations that running it again takes beside those of `saved`; none where all of it is held."""


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
    again_flops: float
    """Operations that are carried out a second time."""
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
        self._lane_s = {name: lane.busy_s for name, lane in work.lanes.items()}
        self._parts: dict[int, Parts] = {}
        self._beyond = 0
        self._members: dict[int, list[int]] = defaultdict(list)
        for index, each in enumerate(work.saved):
            self._members[each.segment].append(index)
        again = sum(each.flops for each in work.saved if not isinf(each.flops)) + sum(work.rest_flops.values())
        self._again = again
        self._plain_s = self._seconds(again, {})

    def placement(self) -> Placement:
        """All of it: what has no choice, what saves most per byte, and what is left of segments that need not run."""
        saved = self._work.saved
        last_first = range(len(saved) - 1, -1, -1)  # what is made last is used first, and has the least time to return
        for index in last_first:
            if isinf(saved[index].flops):
                self._must(index)
        for index in sorted((i for i in last_first if 0 < saved[i].flops < inf), key=self._worth, reverse=True):
            self._may([index], saved[index].flops)
        for segment in sorted(self._members, reverse=True):
            rest = [index for index in self._members[segment] if index not in self._parts]
            if rest or self._work.rest_flops.get(segment):
                flops = sum(saved[index].flops for index in rest)
                self._may(rest, flops + self._work.rest_flops.get(segment, 0.0))
        return Placement(
            parts=self._parts,
            seconds=self._seconds(self._again, {}),
            plain_s=self._plain_s,
            again_flops=max(self._again, 0.0),
            beyond_nbytes=self._beyond,
        )

    def _worth(self, index: int) -> tuple[float, bool]:
        each = self._work.saved[index]
        return each.flops / max(each.nbytes, 1), each.product

    def _must(self, index: int) -> None:
        """Place what cannot be made again: where it makes the pass longest the least, in the fastest such tier."""
        nbytes = self._work.saved[index].nbytes
        found = [parts for parts in self._ways([nbytes]) if parts is not None]
        if not found:
            self._beyond += nbytes
            self._take([index], [(Part(place="keep", nbytes=nbytes),)], 0.0)
            return
        self._take([index], min(found, key=lambda parts: self._seconds(self._again, _moved(parts))), 0.0)

    def _may(self, indices: Sequence[int], flops: float) -> None:
        """Place some together if that is worth it: they are kept, or the pass becomes shorter."""
        now = self._seconds(self._again, {})
        for parts in self._ways([self._work.saved[index].nbytes for index in indices]):
            if parts is None:
                continue
            moved = _moved(parts)
            if all(not self._lanes_of[place] for place in moved) or self._seconds(self._again - flops, moved) < now:
                self._take(indices, parts, flops)
                return

    def _ways(self, sizes: Sequence[int]) -> Iterable[list[Parts] | None]:
        """Ways to place tensors of these sizes: from each tier on; None for one without room."""
        places = [tier.place for tier in self._work.tiers]
        for first in range(len(places)):
            yield self._fill(sizes, places[first:])

    def _fill(self, sizes: Sequence[int], places: Sequence[Place]) -> list[Parts] | None:
        room = {place: self._room[place] for place in places}
        found: list[Parts] = []
        for size in sizes:
            left, parts = size, []
            for place in places:
                take = left if room[place] >= left else int(room[place]) // GRAIN * GRAIN
                if take > 0:
                    parts.append(Part(place=place, nbytes=take))
                    room[place] -= take
                    left -= take
            if left:
                return None
            found.append(tuple(parts))
        return found

    def _take(self, indices: Sequence[int], parts: Sequence[Parts], flops: float) -> None:
        for index, each in zip(indices, parts, strict=True):
            self._parts[index] = each
            for part in each:
                if part.place in self._room:
                    self._room[part.place] = max(0, self._room[part.place] - part.nbytes)
        for name, seconds in self._more(_moved(parts)).items():
            self._lane_s[name] += seconds
        self._again -= flops

    def _seconds(self, again_flops: float, moved: Mapping[Place, int]) -> float:
        """Of the pass, with so much made again and so many bytes more on their ways."""
        more = self._more(moved)
        compute = self._work.compute_s + max(again_flops, 0.0) / self._work.flops_per_s
        return max([compute, *(seconds + more.get(name, 0.0) for name, seconds in self._lane_s.items())])

    def _more(self, moved: Mapping[Place, int]) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for place, nbytes in moved.items():
            for name in self._lanes_of.get(place, ()):
                found[name] += nbytes * self._work.lanes[name].byte_s
        return found


def _moved(parts: Iterable[Parts]) -> dict[Place, int]:
    found: dict[Place, int] = defaultdict(int)
    for each in parts:
        for part in each:
            found[part.place] += part.nbytes
    return found
