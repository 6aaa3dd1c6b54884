"""Which block to bring next, and which to drop for it.

With the future known, the best victim is the block whose next use is farthest away (Belady, 1966), and nothing is
brought that will be used later than everything it could replace. Under a cyclic order this keeps the ring full of the
next blocks, and a block just used, whose turn is a whole cycle away, is the first to go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetch:
    """Bring `block`, dropping `victim` first if there is one."""

    block: int
    victim: int | None


def next_fetch(
    upcoming: Iterable[int], *, present: Collection[int], evictable: Set[int], free_slots: int
) -> Fetch | None:
    """The next block to bring into a ring, or None when nothing would be gained.

    Args:
        upcoming: Predicted accesses that concern this ring, nearest first.
        present: Blocks in the ring or on their way into it.
        evictable: Those of them that are ready and not leased.
        free_slots: Slots that hold nothing.
    """
    if not free_slots and not evictable:
        return None
    later = dict.fromkeys(evictable)  # keeps the order of the set's iteration: stable for the same contents
    candidate: int | None = None
    for block in upcoming:
        if candidate is None:
            if block not in present:
                if free_slots:
                    return Fetch(block=block, victim=None)
                candidate = block
                if not later:
                    return None  # all that could go is needed sooner
                if len(later) == 1:
                    break
            else:
                later.pop(block, None)
        elif block in later and len(later) > 1:
            del later[block]
            if len(later) == 1:
                break
    if candidate is None or not later:
        return None
    return Fetch(block=candidate, victim=min(later))


def victim_for_demand(upcoming: Iterable[int], *, evictable: Set[int]) -> int | None:
    """The block to drop for one that is needed now: the one used last among those that may go."""
    if not evictable:
        return None
    later = set(evictable)
    for block in upcoming:
        if len(later) == 1:
            break
        later.discard(block)
    return min(later)


def first_unloaded(upcoming: Iterable[int], unloaded: Mapping[int, object] | Set[int]) -> int | None:
    """The next block that has a slot of its own and is not in it yet."""
    return next((block for block in upcoming if block in unloaded), None)
