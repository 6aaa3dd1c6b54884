"""What training keeps in host memory, of gradients and of optimizer states: by what a byte of room saves.

Weights come first, and are planned before (a byte of them that stays saves a read in forward, one in backward, and a
write). Of what room they leave, a byte of a gradient saves a write and a read per backward pass, and a byte of state a
read and a write per step; states are written once per commit even so, and come last.

Within a kind every byte is worth the same, and what is kept is spread over the order of use, so that the drive works
all the time: positions are taken by their reversed binary digits, of which any beginning is spread evenly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

STATE_MOVES: Final = 2
"""Bytes moved per step for each byte of state on disk: it is read and written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """What is kept; all else is on disk."""

    gradients: frozenset[int]
    """Places in the list of gradients."""
    states: frozenset[int]
    """Places in the list of states."""
    nbytes: int
    """Host memory for both, and for what passes through where gradients go to disk."""
    moved_nbytes: int
    """Per step, of what is not kept."""

    def spills(self, count: int) -> bool:
        """Whether some of so many gradients go to disk."""
        return len(self.gradients) < count


def share_out(
    room: int, *, gradients: Sequence[int], gradient_moves: int, states: Sequence[int], passing_nbytes: int
) -> Shares:
    """Share room out, a byte going where it saves most. More room never leaves more bytes to be moved.

    It takes what fits in one fixed order, whose worth per byte never rises: where more room lets a piece in that less
    room left out, this piece alone is worth more than all that the lesser room can hold from there on.

    Args:
        room: Bytes of host memory; room for all gradients, or for what passes through, is there at least.
        gradients: Bytes of each that can be kept or not.
        gradient_moves: Bytes moved per step for each byte of a gradient on disk; not fewer than STATE_MOVES.
        states: Bytes of each shard of masters and states.
        passing_nbytes: Of the buffers that gradients on disk pass through, if there are any.
    """
    assert gradient_moves >= STATE_MOVES, gradient_moves
    every = sum(gradients)
    fits = every <= room
    assert fits or room >= passing_nbytes, (room, every, passing_nbytes)
    left = room if fits else room - passing_nbytes
    kept = frozenset(range(len(gradients))) if fits else _first_fit(gradients, left)
    left -= sum(gradients[index] for index in kept)
    held = _first_fit(states, left)
    left -= sum(states[index] for index in held)
    on_disk = every - sum(gradients[index] for index in kept)
    moved = gradient_moves * on_disk + STATE_MOVES * (sum(states) - sum(states[index] for index in held))
    return Shares(gradients=kept, states=held, nbytes=room - left, moved_nbytes=moved)


def _first_fit(sizes: Sequence[int], room: int) -> frozenset[int]:
    kept = set()
    for index in spread(len(sizes)):
        if sizes[index] <= room:
            kept.add(index)
            room -= sizes[index]
    return frozenset(kept)


def spread(count: int) -> Iterable[int]:
    """All numbers below `count`, so that the first few are spread evenly over them: 0, 4, 2, 6, 1, 5, 3, 7."""
    digits = max(count - 1, 0).bit_length()
    turned = (int(format(number, f"0{digits}b")[::-1], 2) if digits else 0 for number in range(1 << digits))
    return [number for number in turned if number < count]


def is_taken(index: int, share: float) -> bool:
    """Whether the thing of this number is among those that a share is made of: spread evenly, the first one last."""
    return int((index + 1) * share) > int(index * share)
