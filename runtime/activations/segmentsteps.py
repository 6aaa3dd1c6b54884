"""A recorded segment as steps of which some are held: `scheduler/recomputing.py` says which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from ...scheduler.recomputing import Choice, Step, choices
from .operations import NOT_MADE, Kind, Operation

Result = tuple[int, int]
"""An operation, and which of its results."""
Rates = Mapping[Kind, float]
"""Seconds for an operation on numbers, by what makes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedStorage:
    """A storage that a segment left for backward."""

    number: int
    """In the order in which it saved them."""
    nbytes: int
    source: int
    """The operation that wrote it last; NOT_MADE where it was there before."""
    output: int
    """Which of its results it is."""
    holds: bool
    """Whether it stands for that operation: it is as the operation made it, and can be given in its place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What a segment did."""

    operations: Sequence[Operation] = ()
    changed: frozenset[int] = frozenset()
    """Operations whose results were changed in place afterwards."""
    looked_at: frozenset[int] = frozenset()
    """Operations whose results became numbers in Python."""
    opaque: bool = True
    """Whether only what is held can be spared, since more had a part in it than operations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Something to be held: a storage that is saved, or a result that is not."""

    nbytes: int
    number: int | None = None
    """Of the storage, among those that are saved."""
    result: Result | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """What is held together, beside the groups before."""

    held: tuple[Held, ...]
    seconds: float
    """That are saved."""

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return sum(each.nbytes for each in self.held)


class SegmentChoices:
    """Finds what to hold of segments; those that are alike are thought about once.

    Args:
        rates: Of the processor.
    """

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._known: dict[tuple[Step, ...], list[Choice]] = {}

    def groups(self, recorded: Recorded, saved: Sequence[SavedStorage]) -> list[Group]:
        """What to hold of one, what saves most per byte first; with all of them it need not run again."""
        steps, contents = self._steps(recorded, saved)
        key = tuple(steps)
        if key not in self._known:
            self._known[key] = choices(key)
        return [
            Group(held=tuple(each for number in choice.steps for each in contents[number]), seconds=choice.seconds)
            for choice in self._known[key]
        ]

    def _steps(self, recorded: Recorded, saved: Sequence[SavedStorage]) -> tuple[list[Step], list[tuple[Held, ...]]]:
        by_result = {(each.source, each.output): each for each in saved if each.holds}
        able = [
            number
            for number, operation in enumerate(recorded.operations)
            if operation.holds and number not in recorded.changed
        ]
        contents: list[tuple[Held, ...]] = [()] * len(recorded.operations)
        for number in able:
            contents[number] = tuple(
                _held(by_result.get((number, output)), nbytes, (number, output))
                for output, nbytes in enumerate(recorded.operations[number].nbytes)
            )
        steps = [self._step(recorded, number, contents[number]) for number in range(len(recorded.operations))]
        stand = {each.number for held in contents for each in held if each.number is not None}
        for each in saved:
            if each.number not in stand:  # it is wanted, and stands for no operation
                inputs = () if each.source == NOT_MADE else (each.source,)
                steps.append(Step(inputs=inputs, seconds=0.0, nbytes=each.nbytes, needed=True))
                contents.append((Held(nbytes=each.nbytes, number=each.number),))
        return steps, contents

    def _step(self, recorded: Recorded, number: int, contents: Sequence[Held]) -> Step:
        operation = recorded.operations[number]
        needed = any(each.number is not None for each in contents)
        forced = operation.forced or number in recorded.looked_at
        inputs = operation.inputs
        if recorded.opaque:  # all is carried out that is not held itself
            whole = bool(contents) and all(each.number is not None for each in contents)
            inputs, needed, forced = (), whole, not whole
        nbytes = sum(each.nbytes for each in contents) if contents else inf
        seconds = operation.flops * self._rates[operation.kind]
        return Step(inputs=inputs, seconds=seconds, nbytes=nbytes, needed=needed, forced=forced)


def _held(saved: SavedStorage | None, nbytes: int, result: Result) -> Held:
    return Held(nbytes=nbytes, result=result) if saved is None else Held(nbytes=nbytes, number=saved.number)
