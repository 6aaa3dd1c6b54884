"""What stays is chosen anew when the order has settled: blocks that it does not use make room for some that it does.

A plan keeps a share of every block's bytes as if each ran once per sweep. An encoder–decoder runs its encoder once per
answer, and its decoder never projects the encoder's output again after the first token: what stays of those is idle
while the decoder repeats. Slots keep their sizes; only their owners change.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """`leaves` gives its slot to `comes`, which stays from then on."""

    leaves: int
    comes: int


def exchanges(
    order: Sequence[int], *, slots: Mapping[int, int], idle: Set[int], sizes: Mapping[int, int]
) -> list[Exchange]:
    """The exchanges that save the most bytes per sweep.

    The largest block that wants to stay takes the smallest slot that holds it. What fits a slot fits every larger one,
    so no other assignment keeps more bytes. Among blocks of like size the chosen ones are spread over the order.

    Args:
        order: The accesses that repeat.
        slots: Bytes of the slots of the blocks that stay now.
        idle: Those of them that may leave.
        sizes: Bytes that each block needs.
    """
    used = set(order)
    free = sorted((slots[block], block) for block in idle - used)
    if not free:
        return []
    wanted = [block for block in dict.fromkeys(order) if block not in slots]
    chosen = []
    for block in sorted(_spread(wanted), key=lambda block: -sizes[block]):
        index = bisect_left(free, (sizes[block], -1))
        if index < len(free):
            chosen.append(Exchange(leaves=free.pop(index)[1], comes=block))
    return chosen


def _spread(blocks: Sequence[int]) -> Iterable[int]:
    """The same blocks, so ordered that every first few of them lie apart (van der Corput, 1935)."""
    width = len(blocks).bit_length()
    places = sorted(range(len(blocks)), key=lambda place: int(f"{place:0{width}b}"[::-1], 2))
    return (blocks[place] for place in places)
