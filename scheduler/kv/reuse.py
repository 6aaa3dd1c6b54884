"""How much of a stored prefix to read, and how much of it to compute again: whatever has the prompt there first.

Reading takes bytes over the disk's rate, computing takes arithmetic and a sweep over weights for each call. What is
read is a beginning, and what follows is computed on top of it, one after the other. Where only bytes and arithmetic
count, all or nothing is best: keys and values take κ bytes per token, and reading wins from B > κ · (tokens per second
of prefill) on. But calls come in steps: weights that are read for a call cost the same for few tokens as for many, and
then it pays to read just what saves a call, and to compute the rest in the shadow of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...memory.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadTime:
    """What reading takes."""

    rate: float
    """Bytes per second."""
    start_s: float = 0.0
    """Before the first byte arrives."""

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise UsageError(f"a rate of {self.rate} bytes per second never reads anything: give one above 0")

    def seconds(self, nbytes: int) -> float:
        """Of so many bytes; nothing for none."""
        return self.start_s + nbytes / self.rate if nbytes else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reuse:
    """A choice, with what it was chosen among."""

    read_blocks: int
    """From the first one on; those after them are computed."""
    seconds: float
    """Until keys and values of the whole prompt are there."""
    read_all_s: float
    """The same if all blocks were read,"""
    compute_all_s: float
    """and if none was."""


def reuse(
    blocks: int,
    *,
    block_tokens: int,
    block_nbytes: int,
    reading: ReadTime,
    prefill_s: Callable[[int], float],
) -> Reuse:
    """The beginning of a hit that is worth reading; of equal ones the longest, since reading leaves cores free.

    Args:
        blocks: That the store has.
        block_tokens: Tokens of each.
        block_nbytes: Bytes of each.
        reading: What that takes.
        prefill_s: Seconds of computing the prompt from a token on to its end, what no store has included.

    Raises:
        UsageError: there is a negative number of blocks.
    """
    if blocks < 0:
        raise UsageError(f"{blocks} blocks: there cannot be fewer than none")
    times = [reading.seconds(count * block_nbytes) + prefill_s(count * block_tokens) for count in range(blocks + 1)]
    best = min(range(blocks + 1), key=lambda count: (times[count], -count))
    return Reuse(read_blocks=best, seconds=times[best], read_all_s=times[-1], compute_all_s=times[0])
