"""Blocks that nobody may have for a while, because their bytes change. Used under the executor's lock."""

from __future__ import annotations

from concurrent.futures import Future

from .residence import Tier


class Withdrawals:
    """Waits until nobody uses such a block any more, and drops its copies.

    Args:
        front: The tier that consumers lease from.
        back: The host tier below it; None when they are one tier.
    """

    def __init__(self, front: Tier, back: Tier | None) -> None:
        self._front, self._back = front, back
        self.away: dict[int, Future[None]] = {}
        """By block: done as soon as nobody has it any more."""

    def begin(self, block: int) -> Future[None]:
        """Let nobody have a block until `end`; done once it is as `retire` leaves it."""
        assert block not in self.away, f"block {block} is withdrawn already"
        gone: Future[None] = Future()
        self.away[block] = gone
        self.retire(block)
        return gone

    def end(self, block: int) -> None:
        """Whoever wants it may have it."""
        gone = self.away.pop(block)
        assert gone.done(), f"block {block} was not gone yet"

    def retire(self, block: int) -> None:
        """Drop the copies of a withdrawn block as soon as nobody uses them, except one that stays in its home."""
        gone = self.away.get(block)
        if gone is None or gone.done():
            return
        home = self._front if self._back is None else self._back
        copies = [(tier, tier.holding[block]) for tier in (self._front, self._back) if tier and block in tier.holding]
        if any(not held.ready or held.leases or held.pins for _, held in copies):
            return
        for tier, held in copies:
            if tier is not home or not held.permanent:
                held.used = True  # it was brought for nothing, but not by a wrong guess
                tier.drop(block)
        gone.set_result(None)

    def fail(self, reason: Exception) -> None:
        """Tell everybody who waits that nothing more will happen."""
        for gone in self.away.values():
            if not gone.done():
                gone.set_exception(reason)
