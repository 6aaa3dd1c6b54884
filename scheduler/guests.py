"""Blocks in slots of somebody else's, who decides when they come and go: experts. Used under the executor's lock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..memory.arena import Slot
from .residence import Residence, Tier


class Guests:
    """Takes such blocks in, and forgets them.

    Args:
        front: The tier that consumers lease from.
        back: The host tier below it; None when they are one tier.
    """

    def __init__(self, front: Tier, back: Tier | None) -> None:
        self._front, self._back = front, back
        self._to_bring: list[Residence] = []
        self._to_keep: list[Residence] = []
        """What is to be read into slots in host memory above which there is a device."""

    def forget(self, blocks: Iterable[int]) -> None:
        """Give up those that nobody leases and nothing brings; others that are not there any more are passed over."""
        for block in blocks:
            if block in self._front.holding:
                self._front.drop(block)

    def take_in(self, places: Iterable[tuple[int, Slot]], *, urgent: bool) -> None:
        """Have blocks brought, each into its slot, in this order."""
        self._to_bring += [self._front.take_in(block, slot, urgent=urgent) for block, slot in places]

    def keep(self, places: Iterable[tuple[int, Slot]]) -> list[int]:
        """Have blocks read into slots in host memory, except what passes through it just now; those that are."""
        back = self._back
        taken = [] if back is None else [each for each in places if each[0] not in back.holding]
        if back is not None:
            self._to_keep += [back.take_in(block, slot) for block, slot in taken]
        return [block for block, _ in taken]

    def let_go(self, blocks: Iterable[int]) -> list[int]:
        """Forget host copies, as far as nobody uses them and nothing moves them; those whose slots are free now."""
        back = self._back
        assert back is not None, "there is one tier: what is brought is forgotten by `bring`"
        free = []
        for block in blocks:
            held = back.holding.get(block)
            if held is None or not held.guest:  # it could not be read
                free.append(block)
            elif block not in back.arriving and not held.leases and not held.pins:
                back.drop(block)
                free.append(block)
        return free

    def for_front(self) -> Sequence[Residence]:
        """What is to be brought now, once."""
        bring, self._to_bring = self._to_bring, []
        return bring

    def for_back(self) -> Sequence[Residence]:
        """What is to be read into host memory now, once."""
        keep, self._to_keep = self._to_keep, []
        return keep
