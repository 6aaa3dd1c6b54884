"""Consumers that wait for blocks. Used under the executor's lock."""

from __future__ import annotations

from collections.abc import Callable

from .lease import Lease, Wish
from .residence import Residence
from .tally import Tally


class Wishes:
    """What is waited for, until it is granted or refused.

    Args:
        tally: Counts the time.
        clock: Nanoseconds, monotonic.
    """

    def __init__(self, tally: Tally, clock: Callable[[], int]) -> None:
        self._tally = tally
        self._clock = clock
        self.waiting: list[Wish] = []
        """In the order in which they came."""
        self.failed: dict[int, Exception] = {}
        """What became of blocks that nobody waited for."""

    def add(self, block: int, *, host: bool = False, counted: bool = True) -> Wish:
        """A consumer waits from now on."""
        wish = Wish(block=block, since_ns=self._clock(), host=host, counted=counted)
        self.waiting.append(wish)
        return wish

    def forget(self, wish: Wish) -> bool:
        """The consumer waits no more; whether it was waiting still, and has been given nothing."""
        waits = wish in self.waiting
        if waits:
            self.waiting.remove(wish)
        return waits

    def grant(self, wish: Wish, held: Residence) -> None:
        """The block is there: lease it."""
        waited = self._clock() - wish.since_ns
        held.leases += 1
        held.used = held.used or wish.counted
        self._tally.waited_ns += waited
        self.waiting.remove(wish)
        self._tally.span("wait", wish.block, wish.since_ns)
        if not wish.host and wish.counted:
            self._tally.used(held, wish.since_ns)
        wish.granted.set_result(Lease(residence=held, waited_ns=waited))

    def refuse(self, wish: Wish, error: Exception) -> None:
        """The block will not come: raise in the consumer's thread."""
        self.waiting.remove(wish)
        wish.granted.set_exception(error)
