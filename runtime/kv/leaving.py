"""What leaves the tiers of one layer, so that there is room in faster ones: from each tier, first in, first out."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from ...memory.errors import PenstockError
from ...scheduler.kv.moves import Move
from ...scheduler.kv.tiers import Farness, Tiers
from .placement import Numbers


class Moving(Protocol):
    """A block on its way to a slower tier."""

    def done(self) -> bool:
        """Whether it is there, or never will be."""
        ...

    def wait(self) -> bool:
        """Wait until then; raises what it met."""
        ...


class Leaving:
    """The moves of one layer that are under way.

    Args:
        tiers: Of the layer.
        numbers: Of these.
        spills: Whether there is a disk among them.
        begin: Begins to carry out a move.
        farness: Of a block: the larger, the sooner it goes.
        changed: Called when blocks have come or gone.
    """

    def __init__(
        self,
        tiers: Tiers,
        numbers: Numbers,
        *,
        spills: bool,
        begin: Callable[[Move], Moving],
        farness: Farness,
        changed: Callable[[], None],
    ) -> None:
        self._tiers = tiers
        self._numbers = numbers
        self._spills = spills
        self._begin = begin
        self._farness = farness
        self._changed = changed
        self._moving: defaultdict[int, deque[tuple[Move, Moving]]] = defaultdict(deque)
        """By the tier that they leave: a copy to host memory is not to be heard of behind a write to disk."""
        self.written_nbytes = 0
        """To disk, in whole slots."""

    @property
    def under_way(self) -> bool:
        """Whether there are any."""
        return any(self._moving.values())

    def free(self, slots: int, *, ahead: bool = False) -> None:
        """Begin to free slots of the fastest tier. What leaves a device needs a place in host memory first: nothing
        goes from there to disk at once.

        Args:
            slots: To be free then.
            ahead: Nobody needs them yet: where that takes a write to disk first, it is only begun.

        Raises:
            DoesNotFitError: slower tiers have no room, or too much is in use.
            DiskError: a drive failed.
        """
        if self._numbers.device is not None and self._spills:
            host, leaving = self._numbers.host, slots - self._tiers.free(0) - len(self._moving[0])
            if leaving > self._tiers.free(host):
                self.evict(host, leaving)
                if ahead:
                    return
                self.wait_for(host, leaving)
                if self._tiers.free(host) < leaving:
                    raise self._tiers.no_room(host, leaving)
        self.evict(0, slots)

    def evict(self, tier: int, slots: int) -> None:
        """Begin to free slots of a tier; errors as for `free`."""
        moves = list(self._tiers.make_room(tier, slots, self._farness))
        self._changed()  # clean copies may have been dropped
        while moves:
            try:
                moving = self._begin(moves[0])
            except BaseException:
                for move in moves:
                    self._tiers.finish(move, failed=True)
                raise
            self._moving[tier].append((moves.pop(0), moving))

    def wait_for(self, tier: int, slots: int) -> None:
        """Wait until a tier has so many free slots, or nothing leaves it any more."""
        while self._moving[tier] and self._tiers.free(tier) < slots:
            self._finish_first(tier)

    def collect(self, *, wait: bool) -> None:
        """Hear of what has arrived; the first failure is raised, and that block stays where it was."""
        for tier, moving in self._moving.items():
            while moving and (wait or moving[0][1].done()):
                self._finish_first(tier)

    def abandon(self) -> None:
        """Wait for all of it, whatever becomes of it."""
        for tier, moving in self._moving.items():
            while moving:
                with suppress(PenstockError):
                    self._finish_first(tier)

    def _finish_first(self, tier: int) -> None:
        move, moving = self._moving[tier].popleft()
        failed = True
        try:
            moving.wait()
            failed = False
        finally:
            self._tiers.finish(move, failed=failed)
            self._changed()
        if move.target == self._numbers.disk:
            self.written_nbytes += move.nbytes
