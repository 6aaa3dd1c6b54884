"""Host copies of blocks while the copy to the device reads them: pinned, so that nobody takes their slots."""

from __future__ import annotations

import asyncio
import threading

from .loop import Loop
from .residence import Residence, Tier
from .withdrawals import Withdrawals


class Sources:
    """Pins them in the core's loop.

    Args:
        tier: The host tier.
        lock: The executor's. Nobody holds it who calls.
        loop: Looks again when there may be room.
    """

    def __init__(self, tier: Tier, lock: threading.Lock, withdrawals: Withdrawals, loop: Loop) -> None:
        self._tier = tier
        self._lock = lock
        self._withdrawals = withdrawals
        self._loop = loop
        self._placed = asyncio.Event()
        """Set, and replaced, whenever a block gets a slot."""

    def placed(self) -> None:
        """Blocks have got slots."""
        self._placed.set()
        self._placed = asyncio.Event()

    async def pin(self, block: int) -> Residence:
        """The host residence of a block, as soon as it has a slot.

        Raises:
            Exception: whatever stopped a guest from being read.
        """
        while True:
            with self._lock:
                held = self._tier.holding.get(block)
                if held is not None and held.error is None:  # one that failed goes with its last copy
                    held.pins += 1
                    return held
                if held is not None and held.error is not None and held.guest and not held.pins:
                    self._tier.drop(block)  # nobody else will: nothing brings a guest but who has given it its slot
                    raise held.error
            self._loop.rouse()
            await self._placed.wait()

    def unpin(self, source: Residence) -> None:
        """A copy reads it no more: what only passed through goes with the last one."""
        with self._lock:
            source.pins -= 1
            passes = not source.permanent and not source.guest
            gone = source.error is not None or (source.ready and passes)  # not while it is still filled
            if gone and not source.pins and self._tier.holding.get(source.block) is source:
                source.used = True
                self._tier.drop(source.block)
            self._withdrawals.retire(source.block)
        self._loop.rouse()
