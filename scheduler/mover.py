"""What the executor needs of the machine: reads, copies and events. Implemented over devices, and by mocks in tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..memory.arena import Slot

Event = object
"""A point on a stream, as the device backend represents it; None stands for one that has passed."""


class Mover(Protocol):
    """Moves bytes. Coroutines run in the executor's loop and must not block it."""

    async def read(self, block: int, slot: Slot, *, urgent: bool, on_data: Callable[[int, int], None]) -> None:
        """Fill a host slot from disk. `on_data` is called in the loop as parts arrive.

        Raises:
            PenstockError: the read failed.
        """
        ...

    def before_copy(self, target: Slot) -> None:
        """Make the copy stream wait until nothing uses `target` any more (its guard)."""
        ...

    def copy(self, block: int, source: Slot, target: Slot, start: int, stop: int) -> None:
        """Enqueue the copy of a part of a block, given in offsets of the source slot, to the device."""
        ...

    def copied(self) -> Event:
        """An event on the copy stream after everything enqueued so far."""
        ...

    async def wait(self, event: Event) -> None:
        """Wait on the host until an event has completed."""
        ...

    def poison(self, slot: Slot) -> None:
        """Fill a slot that is about to be refilled with NaN (debug mode only)."""
        ...

    def progress(self) -> int:
        """A counter that grows while bytes move; the watchdog compares it."""
        ...
