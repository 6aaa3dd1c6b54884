"""Which uses have to bring a block into a ring, and after which use its slot is free, where the whole order is known.

It is what the executor does once it has learned an order (`prefetch.py`): blocks are brought in the order in which they
will be used, each as soon as there is a slot whose block is used later than it, and of several the one goes that is
used last (Belady, 1966). It does not know which blocks will change before they are used: those that it has brought by
then are brought for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Generic, TypeVar

B = TypeVar("B", bound=Hashable)
NEVER: Final = 2**62
"""When a block is used next that is used no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival(Generic[B]):
    """A block is brought into the ring."""

    block: B
    use: int
    """What for: the place in the order. Of what is brought in vain, the use after which it leaves."""
    after: int | None
    """The use that must be over before; None for what is brought before the first one."""
    instead_of: B | None
    """Whose slot it takes; None for a slot that nothing is in."""
    in_vain: bool = False
    """Whether it leaves before it is used."""


def arrivals(
    order: Sequence[Sequence[B]], slots: int, *, changes: Mapping[int, Collection[B]] | None = None
) -> list[Arrival[B]]:
    """All of them, in the order in which they are brought.

    Args:
        order: Uses, one after the other: the blocks that each has at once.
        slots: Of the ring; more than the blocks of any use.
        changes: By use: blocks that are dropped when it is over, for they change. What is used of them again is brought
            anew.
    """
    assert all(len(set(blocks)) < slots for blocks in order), (slots, max(map(len, order), default=0))
    ring = _Ring(order, slots)
    ring.fill(None)
    for use in range(len(order)):
        ring.use(use)
        ring.fill(use)
        changed = (changes or {}).get(use, ())
        if changed:
            ring.drop(changed, use)
            ring.fill(use)
    return ring.found


class _Ring(Generic[B]):
    """What is in it, use by use."""

    def __init__(self, order: Sequence[Sequence[B]], slots: int) -> None:
        self.found: list[Arrival[B]] = []
        self._order = order
        self._slots = slots
        self._next_uses = _next_uses(order)
        self._following: dict[B, int] = {}
        """Of the blocks in it: the next use."""
        self._unused: dict[B, int] = {}
        """Of those of them that were not used since they came: the arrival, by its place among those found."""
        self._sought = 0
        """The first use whose blocks may not all be there."""

    def use(self, use: int) -> None:
        """Its blocks are used."""
        for block in self._order[use]:
            self._following[block] = self._next_uses[use][block]
            self._unused.pop(block, None)
        self._sought = max(self._sought, use + 1)

    def fill(self, after: int | None) -> None:
        """Bring what can be brought before the next use."""
        while (block := self._missing()) is not None:
            victim: B | None = None
            if len(self._following) == self._slots:
                victim = max(self._following, key=self._following.__getitem__)
                if self._following[victim] <= self._sought:
                    return
                self._leave(victim, after)
            self._following[block] = self._sought
            self._unused[block] = len(self.found)
            self.found.append(Arrival(block=block, use=self._sought, after=after, instead_of=victim))

    def _missing(self) -> B | None:
        """The next block that is not there."""
        while self._sought < len(self._order):
            for block in self._order[self._sought]:
                if block not in self._following:
                    return block
            self._sought += 1
        return None

    def drop(self, blocks: Collection[B], use: int) -> None:
        """They change: what the ring has of them is worth nothing."""
        for block in blocks:
            if block in self._following:
                self._leave(block, use)
                self._sought = use + 1

    def _leave(self, block: B, use: int | None) -> None:
        del self._following[block]
        place = self._unused.pop(block, None)
        if place is not None:
            assert use is not None, "what comes before the first use is used in turn"
            self.found[place] = replace(self.found[place], use=use, in_vain=True)


def _next_uses(order: Sequence[Sequence[B]]) -> list[dict[B, int]]:
    """By use: of each of its blocks the use that follows."""
    coming: dict[B, int] = {}
    found: list[dict[B, int]] = [{} for _ in order]
    for use in reversed(range(len(order))):
        for block in order[use]:
            found[use][block] = coming.get(block, NEVER)
        coming.update(dict.fromkeys(order[use], use))
    return found
