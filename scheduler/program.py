"""What one call of a model does, in order: modules that begin and end, and the operations between."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from .operations import Operation


class Enter(msgspec.Struct, frozen=True):
    """A module's forward begins."""

    path: str


class Leave(msgspec.Struct, frozen=True):
    """It ends."""

    path: str


Event = Enter | Leave | Operation


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """One call of the root."""

    title: str
    """prefill, decode, forward, …"""
    tokens: int
    """New ones that come out of it: the sequences of the batch, or 0."""
    events: tuple[Event, ...]
    learned: frozenset[int] = frozenset()
    """Places of the events that are products with weights which are trained."""

    def operations(self) -> Iterator[Operation]:
        """Only what computes."""
        return (event for event in self.events if isinstance(event, Operation))

    def by_module(self) -> Iterator[tuple[str, Operation]]:
        """Each operation with the innermost module around it."""
        stack = [""]
        for event in self.events:
            match event:
                case Enter(path=path):
                    stack.append(path)
                case Leave():
                    stack.pop()
                case _:
                    yield stack[-1], event
