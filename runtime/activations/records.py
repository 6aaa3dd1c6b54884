"""What a first forward shows of each segment, and what is decided by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from ...scheduler.activations import GRAIN, Lane, Part, Pass, Placement, Saved, Tier, place_activations
from .operations import NOT_MADE, Operation

FORWARDS: Final = 3
"""Of computing, that a pass takes: backward has two products for each one of forward."""
Key = tuple[int, int]
"""Of a segment: its number in the model, and how often it was called before in this forward. (-1, n) is the n-th
storage outside of segments."""
OUTSIDE: Final = -1
Places = Mapping[int, Sequence[Part]]
"""By the number of a storage among those that a segment saves. What is missing is made again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedStorage:
    """A storage that a segment left for backward."""

    number: int
    """In the order in which it saved them."""
    nbytes: int
    operation: int
    """That made it; NOT_MADE where it cannot be skipped for it."""
    output: int
    """Which of its results it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentRecord:
    """One call of a segment."""

    key: Key
    inputs_nbytes: int
    saved: tuple[SavedStorage, ...]
    operations: Sequence[Operation]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a forward took of the processor."""

    seconds: float
    product_s: float
    product_flops: float


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
    whole: frozenset[Key]
    """Segments of which nothing is made again."""
    inputs_nbytes: Mapping[Key, int]
    """What it was made for: larger ones ask for another."""
    placement: Placement
    saved_nbytes: int


def plan_activations(records: Sequence[SegmentRecord], measured: Measured, machine: Machine) -> ActivationPlan:
    """Decide where all that these segments left is to be in the next forward."""
    saved: list[Saved] = []
    members: list[tuple[Key, tuple[SavedStorage, ...]]] = []
    rest: dict[int, float] = {}
    for place, record in enumerate(records):
        left = sum(operation.flops for operation in record.operations)
        for group, operation in _groups(record):
            flops = operation.flops if operation is not None else 0.0
            left -= flops
            if not machine.again or record.key[0] == OUTSIDE:
                flops = inf
            product = operation is not None and operation.product
            nbytes = sum(each.nbytes for each in group)
            saved.append(Saved(segment=place, nbytes=nbytes, flops=flops, product=product))
            members.append((record.key, group))
        if machine.again and record.key[0] != OUTSIDE:
            rest[place] = max(left, 0.0)
    rate = measured.product_flops / measured.product_s if measured.product_s else 1.0
    placement = place_activations(
        Pass(
            saved=saved,
            tiers=machine.tiers,
            lanes=machine.lanes,
            compute_s=FORWARDS * measured.seconds,
            flops_per_s=rate,
            rest_flops=rest,
        )
    )
    places: dict[Key, dict[int, Sequence[Part]]] = {}
    partial: set[Key] = set()
    for index, (key, group) in enumerate(members):
        parts = placement.parts.get(index)
        if parts is None:
            partial.add(key)
            continue
        for each, own in zip(group, _cut(parts, [each.nbytes for each in group]), strict=True):
            places.setdefault(key, {})[each.number] = own
    every = {record.key for record in records if record.saved}
    return ActivationPlan(
        places=places,
        whole=frozenset(key for key in every if key not in partial),
        inputs_nbytes={record.key: record.inputs_nbytes for record in records},
        placement=placement,
        saved_nbytes=sum(each.nbytes for each in saved),
    )


def _groups(record: SegmentRecord) -> list[tuple[tuple[SavedStorage, ...], Operation | None]]:
    """Storages that go together: all results of an operation that could be skipped, or one that saves nothing alone."""
    by_operation: dict[int, list[SavedStorage]] = {}
    found: list[tuple[tuple[SavedStorage, ...], Operation | None]] = []
    for each in record.saved:
        if each.operation == NOT_MADE:
            found.append(((each,), None))
        else:
            by_operation.setdefault(each.operation, []).append(each)
    for number, group in by_operation.items():
        operation = record.operations[number]
        if len({each.output for each in group}) == len(operation.outputs):
            found.append((tuple(group), operation))
        else:
            found.extend(((each,), None) for each in group)
    return sorted(found, key=lambda each: each[0][0].number)


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
