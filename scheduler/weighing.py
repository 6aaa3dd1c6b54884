"""Room for activations or for weights: whichever makes a step shorter.

Weights that stay save a drive bytes; results of a forward that stay save the processor seconds. A step takes the longer
of what the processor does, with what it makes again, and of what the drive moves. So where the drive has time to spare,
dear results have room before weights, until it has none; where the drive is the bound, weights have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

PARTS: Final = 4
"""Of each kind of results, that rooms are tried for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dear:
    """Results of one kind, of which any part may be held."""

    nbytes: int
    seconds: float
    """Of a step, in which all of them are made again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighing:
    """A step, as far as it depends on what has room."""

    dear: Sequence[Dear]
    """What saves most per byte first."""
    compute_s: float
    """Of the processor, with nothing made again: forward, backward, and the update where it is the same processor."""
    drive_s: float
    """Of the drive, with all weights in memory."""
    weight_byte_s: float
    """Of the drive, for each byte of weights that does not stay."""

    def step_s(self, held_nbytes: int, streamed_nbytes: float) -> float:
        """Seconds of a step.

        Args:
            held_nbytes: Room for results.
            streamed_nbytes: Weights that do not stay.
        """
        drive = self.drive_s + self.weight_byte_s * streamed_nbytes
        return max(self.compute_s + self.again_s(held_nbytes), drive)

    def again_s(self, held_nbytes: int) -> float:
        """Of it, in which results are made again if so many bytes of them are held."""
        seconds, left = 0.0, held_nbytes
        for each in self.dear:
            held = min(left, each.nbytes)
            left -= held
            seconds += each.seconds * (1 - held / each.nbytes)
        return seconds

    def rooms(self) -> list[int]:
        """Rooms to try, growing: to any other the next smaller one of them is worth as much as parts are fine."""
        found, before = [], 0
        for each in self.dear:
            found += [before + each.nbytes * part // PARTS for part in range(1, PARTS + 1)]
            before += each.nbytes
        return sorted(set(found) - {0})


@dataclass(frozen=True, kw_only=True, slots=True)
class Before:
    """Room that results have before weights."""

    nbytes: int
    seconds: float
    """Of a step, as far as it is weighed."""
    without_s: float
    """The same if weights had that room."""


def weigh(weighing: Weighing, streamed: Callable[[int], float | None]) -> Before | None:
    """What room results have before weights; None where a step is no shorter for any.

    Tries all rooms, from small to large, as long as weights can do without.

    Args:
        weighing: The step.
        streamed: Bytes of weights that do not stay if results have so much room; None where weights need that room.
    """
    plain = streamed(0)
    if plain is None:
        return None
    without = least = weighing.step_s(0, plain)
    best = 0
    for room in weighing.rooms():
        moved = streamed(room)
        if moved is None:
            break
        if (seconds := weighing.step_s(room, moved)) < least:
            best, least = room, seconds
    return Before(nbytes=best, seconds=least, without_s=without) if best else None
