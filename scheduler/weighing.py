"""Room for activations or for weights: whichever makes a step shorter.

Weights that stay save a drive bytes; results of a forward that stay save the processor seconds. A step takes the longer
of what the processor does, with what it makes again, and of what the drive moves. So where the drive has time to spare,
dear results have room before weights, until it has none; where the drive is the bound, weights have it.

Where updates wait for the last gradient, a step has two parts, and the drive cannot work ahead from one to the other:
the forward that the update goes on beside, and all that follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

PIECES: Final = 4
"""Of each kind of results, that rooms are tried for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dear:
    """Results of one kind, of which any part may be held."""

    nbytes: int
    seconds: float
    """Of a step, in which all of them are made again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """Weights in the memory that results leave them."""

    streamed_nbytes: float
    """Of those that do not stay."""
    free_nbytes: float = 0.0
    """Of memory, for gradients first, then for more results, then for masters and states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Moved:
    """Bytes that do not stay in memory."""

    weights: float
    gradients: float
    states: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Of a step, in which processor and drive work beside each other."""

    compute_s: float
    """Of the processor."""
    drive_s: float = 0.0
    """Of the drive, whatever has room."""
    weight_byte_s: float
    """Of the drive, for each byte of weights that does not stay."""
    gradient_byte_s: float = 0.0
    state_byte_s: float = 0.0

    def seconds(self, moved: _Moved, again_s: float = 0.0) -> float:
        """What it takes where so much does not stay, and so much is made again."""
        drive_s = self.drive_s + self.weight_byte_s * moved.weights
        drive_s += self.gradient_byte_s * moved.gradients + self.state_byte_s * moved.states
        return max(self.compute_s + again_s, drive_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighing:
    """A step, as far as it depends on what has room."""

    dear: Sequence[Dear]
    """What saves most per byte first."""
    part: Part
    """In which layers run again: all of a step, or what follows the forward that the update goes on beside."""
    update: Part | None = None
    """That forward and the update; None where the update has no part of its own."""
    gradients_nbytes: float = 0.0
    """That could stay in memory until the update."""
    states_nbytes: float = 0.0
    """Likewise, of masters and states."""
    saved_nbytes: float = 0.0
    """Of layers: what results and all else may have of memory that gradients leave."""

    def step_s(self, held_nbytes: int, placed: Placed) -> float:
        """Seconds of a step.

        Args:
            held_nbytes: Room for results.
            placed: What else has room.
        """
        gradients = min(self.gradients_nbytes, placed.free_nbytes)
        left = placed.free_nbytes - gradients
        more = min(left, max(self.saved_nbytes - held_nbytes, 0.0))
        moved = _Moved(
            weights=placed.streamed_nbytes,
            gradients=self.gradients_nbytes - gradients,
            states=max(self.states_nbytes - (left - more), 0.0),
        )
        update = 0.0 if self.update is None else self.update.seconds(moved)
        return self.part.seconds(moved, self.again_s(held_nbytes + more)) + update

    def again_s(self, held_nbytes: float) -> float:
        """Of it, in which results are made again if so many bytes of them are held."""
        seconds, left = 0.0, float(held_nbytes)
        for each in self.dear:
            held = min(left, each.nbytes)
            left -= held
            seconds += each.seconds * (1 - held / each.nbytes)
        return seconds

    def spared_s(self, held_nbytes: int) -> float:
        """Of a step, in which results that are held need not be made again."""
        return self.again_s(0) - self.again_s(held_nbytes)

    def rooms(self) -> list[int]:
        """Rooms to try, growing: to any other the next smaller one of them is worth as much as pieces are fine."""
        found, before = [], 0
        for each in self.dear:
            found += [before + each.nbytes * piece // PIECES for piece in range(1, PIECES + 1)]
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


def weigh(weighing: Weighing, place: Callable[[int], Placed | None]) -> Before | None:
    """What room results have before weights; None where a step is no shorter for any.

    Tries all rooms, from small to large, as long as weights can do without.

    Args:
        weighing: The step.
        place: Gives all else its places, if results have so much room; None where weights need that room.
    """
    plain = place(0)
    if plain is None:
        return None
    without = least = weighing.step_s(0, plain)
    best = 0
    for room in weighing.rooms():
        placed = place(room)
        if placed is None:
            break
        if (seconds := weighing.step_s(room, placed)) < least:
            best, least = room, seconds
    return Before(nbytes=best, seconds=least, without_s=without) if best else None
