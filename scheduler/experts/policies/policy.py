"""What every policy is: something that sees events, and says how much each expert is worth keeping."""

from __future__ import annotations

from typing import ClassVar, Protocol

from ..events import Event
from ..trace import FloatArray


class Policy(Protocol):
    """A policy ranks experts; a cache does the rest: room, victims, what a layer still needs."""

    name: ClassVar[str]
    """As the command line takes it."""
    summary: ClassVar[str]
    """One line: what it keeps."""

    @property
    def values(self) -> FloatArray:
        """[layers, experts] What is worth keeping most has the highest value. Only their order counts. Not to be
        changed by whoever reads it."""

    @property
    def earlier(self) -> FloatArray:
        """[experts] The values of the last event's layer as they would be had that event used none of them. Not to be
        changed by whoever reads it."""

    def seen(self, event: Event) -> None:
        """A layer is about to run: called once per event, before a cache makes room for it."""
