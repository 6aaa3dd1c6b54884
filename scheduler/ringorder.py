"""Which uses have to bring a block into a ring, and after which use its slot is free, where the whole order is known.

It is what the executor does once it has learned an order (`prefetch.py`): blocks are brought in the order in which they
will be used, each as soon as there is a slot whose block is used later than it, and of several the one goes that is
used last (Belady, 1966).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

B = TypeVar("B", bound=Hashable)
NEVER: Final = 2**62
"""When a block is used next that is used no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival(Generic[B]):
    """A block is brought into the ring."""

    block: B
    use: int
    """What for: the place in the order."""
    after: int | None
    """The use that must be over before, since its block's slot is taken; None for a slot that nothing was in."""
    instead_of: B | None
    """That block."""


def arrivals(order: Sequence[Sequence[B]], slots: int) -> list[Arrival[B]]:
    """All of them, in the order in which they are brought.

    Args:
        order: Uses, one after the other: the blocks that each has at once. A block that has changed in between counts
            as another one.
        slots: Of the ring; more than the blocks of any use.
    """
    assert all(len(set(blocks)) < slots for blocks in order), (slots, max(map(len, order), default=0))
    next_uses = _next_uses(order)
    found: list[Arrival[B]] = []
    last: dict[B, int] = {}
    """Of the blocks in the ring: their last use so far."""
    following: dict[B, int] = {}
    """Of them: the use after that."""
    now = -1
    """The use after which the last one was brought: none is brought before it."""
    for use, blocks in enumerate(order):
        for block in dict.fromkeys(blocks):
            if block not in last:
                after: int | None = None
                victim: B | None = None
                if len(last) == slots:
                    # The ring holds nothing that is used between its last use and this one: it has been gone through.
                    idle = [each for each in last if each not in blocks]
                    ready = [each for each in idle if last[each] <= now]
                    victim = max(ready, key=following.__getitem__) if ready else min(idle, key=last.__getitem__)
                    after = last.pop(victim)
                    del following[victim]
                    now = max(now, after)
                found.append(Arrival(block=block, use=use, after=after, instead_of=victim))
            last[block], following[block] = use, next_uses[use][block]
    return found


def _next_uses(order: Sequence[Sequence[B]]) -> list[dict[B, int]]:
    """By use: of each of its blocks the use that follows."""
    coming: dict[B, int] = {}
    found: list[dict[B, int]] = [{} for _ in order]
    for use in reversed(range(len(order))):
        for block in order[use]:
            found[use][block] = coming.get(block, NEVER)
        coming.update(dict.fromkeys(order[use], use))
    return found
