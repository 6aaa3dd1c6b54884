"""Choosing anew what stays, once a call repeats that uses less than the model has. Used under the executor's lock."""

from __future__ import annotations

from typing import Final

from .exchange import exchanges
from .order import AccessOrders
from .residence import Tier
from .tally import Tally

REPEATS: Final = 3
"""Calls of one steady order before what stays is chosen anew: parts that run a few times each in turn must not push
each other out."""


class Adapting:
    """Lets blocks stay that a call which repeats uses, in the place of those that it does not.

    Args:
        front: The tier that consumers lease from.
        back: The host tier below it; None when they are one tier.
        tally: Counts exchanges.
    """

    def __init__(self, front: Tier, back: Tier | None, orders: AccessOrders, tally: Tally) -> None:
        self._front, self._back = front, back
        self._orders = orders
        self._tally = tally
        self._steady: frozenset[int] = frozenset()
        self._repeats = 0
        """How many calls in a row ended a steady order of these blocks."""
        self._adapted: frozenset[int] = frozenset()
        """The blocks of the order for which what stays was chosen last."""

    def call_ended(self) -> None:
        """Count the call, and choose if it is the one that completes the repeats."""
        order = self._orders.steady() or ()
        used = frozenset(order)  # of a cycle of calls each one ends with another rotation of the order
        self._repeats = self._repeats + 1 if used == self._steady else 1
        self._steady = used
        if not used or used == self._adapted or self._repeats < REPEATS:
            return
        self._adapted = used
        for tier in (self._front, self._back):
            if tier is None:
                continue
            here = order if tier is self._front else tuple(b for b in order if b not in self._front.permanent)
            slots = {block: slot.nbytes for block, slot in tier.permanent.items()}
            for change in exchanges(here, slots=slots, idle=tier.movable(), sizes=tier.sizes):
                tier.exchange(change.leaves, change.comes)
                self._tally.exchanged += 1
                self._tally.instant("exchange", change.comes)
