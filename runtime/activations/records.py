"""What a first forward shows of each segment, and what is decided by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final

from ...scheduler.activations import GRAIN, Lane, Part, Pass, Placement, Saved, Tier, place_activations
from .operations import Kind, Spent
from .segmentsteps import Group, Held, Recorded, Result, SavedStorage, SegmentChoices

FORWARDS: Final = 3
"""Of computing, that a pass takes: backward has two products for each one of forward."""
Key = tuple[int, int]
"""Of a segment: its number in the model, and how often it was called before in this forward. (-1, n) is the n-th
storage outside of segments."""
OUTSIDE: Final = -1
Places = Mapping[int, Sequence[Part]]
"""By the number of a storage among those that a segment saves. What is missing is made again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentRecord:
    """One call of a segment."""

    key: Key
    inputs_nbytes: int
    saved: tuple[SavedStorage, ...]
    recorded: Recorded = field(default_factory=Recorded)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a forward took of the processor, by kind of operation."""

    spent: Mapping[Kind, Spent]

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return sum(each.seconds for each in self.spent.values())

    @property
    def rates(self) -> dict[Kind, float]:
        """Seconds of an operation on numbers."""
        return {kind: each.seconds / each.flops if each.flops else 0.0 for kind, each in self.spent.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where activations can go."""

    tiers: Sequence[Tier]
    """The fastest first."""
    lanes: Mapping[str, Lane]
    again: bool
    """Whether what can be made again may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationPlan:
    """The decision for all segments."""

    places: Mapping[Key, Places]
    results: Mapping[Key, Mapping[Result, Sequence[Part]]]
    """Of results that backward has no use for, and from which what it wants is soon made."""
    whole: frozenset[Key]
    """Segments of which nothing is made again."""
    inputs_nbytes: Mapping[Key, int]
    """What it was made for: larger ones ask for another."""
    placement: Placement
    saved_nbytes: int
    again_nbytes: int
    """Of these, made again."""


def plan_activations(records: Sequence[SegmentRecord], measured: Measured, machine: Machine) -> ActivationPlan:
    """Decide where all that these segments left is to be in the next forward."""
    saved: list[Saved] = []
    members: list[tuple[Key, Group]] = []
    ways = SegmentChoices(measured.rates)
    for record in records:
        if machine.again and record.key[0] != OUTSIDE:
            groups = ways.groups(record.recorded, record.saved)
        else:
            groups = [Group(held=(Held(nbytes=each.nbytes, number=each.number),), seconds=inf) for each in record.saved]
        for place, group in enumerate(groups):
            after = len(saved) - 1 if place and group.seconds < inf else None
            saved.append(Saved(nbytes=group.nbytes, seconds=group.seconds, after=after))
            members.append((record.key, group))
    placement = place_activations(
        Pass(saved=saved, tiers=machine.tiers, lanes=machine.lanes, compute_s=FORWARDS * measured.seconds)
    )
    places: dict[Key, dict[int, Sequence[Part]]] = {}
    results: dict[Key, dict[Result, Sequence[Part]]] = {}
    for index, (key, group) in enumerate(members):
        if (parts := placement.parts.get(index)) is None:
            continue
        for each, own in zip(group.held, _cut(parts, [each.nbytes for each in group.held]), strict=True):
            if each.number is not None:
                places.setdefault(key, {})[each.number] = own
            elif each.result is not None:
                results.setdefault(key, {})[each.result] = own
    again = {record.key: _again_nbytes(record, places.get(record.key, {})) for record in records}
    return ActivationPlan(
        places=places,
        results=results,
        whole=frozenset(record.key for record in records if record.saved and not again[record.key]),
        inputs_nbytes={record.key: record.inputs_nbytes for record in records},
        placement=placement,
        saved_nbytes=sum(each.nbytes for record in records for each in record.saved),
        again_nbytes=sum(again.values()),
    )


def _again_nbytes(record: SegmentRecord, places: Places) -> int:
    """Bytes that a segment saves and nothing is held of."""
    return sum(each.nbytes for each in record.saved if each.number not in places)


def _cut(parts: Sequence[Part], sizes: Sequence[int]) -> list[list[Part]]:
    """The parts of several storages that follow each other, for each of them; cuts are at whole pages of each."""
    found: list[list[Part]] = []
    left = list(parts)
    for size in sizes:
        own: list[Part] = []
        missing = size
        while missing:
            part = left.pop(0) if left else Part(place=own[-1].place if own else parts[-1].place, nbytes=missing)
            take = min(part.nbytes, missing)
            if take < missing:  # it ends inside: a cut at a whole page
                take = take // GRAIN * GRAIN
            elif part.nbytes > take:
                left.insert(0, Part(place=part.place, nbytes=part.nbytes - take))
            if take:
                own.append(Part(place=part.place, nbytes=take))
            missing -= take
        found.append(own)
    return found
