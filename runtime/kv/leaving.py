"""What leaves the tiers of one layer, so that there is room in faster ones: first in, first out."""

from __future__ import annotations

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
        self._moving: list[tuple[Move, Moving]] = []
        self.written_nbytes = 0
        """To disk, in whole slots."""

    @property
    def under_way(self) -> bool:
        """Whether there are any."""
        return bool(self._moving)

    def free(self, slots: int) -> None:
        """Begin to free slots of the fastest tier. What leaves a device needs a place in host memory first: nothing
        goes from there to disk at once.

        Raises:
            DoesNotFitError: slower tiers have no room, or too much is in use.
            DiskError: a drive failed.
        """
        if self._numbers.device is not None and self._spills:
            host, leaving = self._numbers.host, slots - self._tiers.free(0)
            if leaving > self._tiers.free(host):
                self.evict(host, leaving)
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
            self._moving.append((moves.pop(0), moving))

    def wait_for(self, tier: int, slots: int) -> None:
        """Wait until a tier has so many free slots, or nothing is under way any more."""
        while self._moving and self._tiers.free(tier) < slots:
            self._finish_first()

    def collect(self, *, wait: bool) -> None:
        """Hear of what has arrived; the first failure is raised, and that block stays where it was."""
        while self._moving and (wait or self._moving[0][1].done()):
            self._finish_first()

    def abandon(self) -> None:
        """Wait for all of it, whatever becomes of it."""
        while self._moving:
            with suppress(PenstockError):
                self._finish_first()

    def _finish_first(self) -> None:
        move, moving = self._moving.pop(0)
        failed = True
        try:
            moving.wait()
            failed = False
        finally:
            self._tiers.finish(move, failed=failed)
            self._changed()
        if move.target == self._numbers.disk:
            self.written_nbytes += move.nbytes
