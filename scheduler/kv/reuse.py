"""How much of a stored prefix to load, and how much of it to compute again: whatever is ready first.

Loading takes bytes over the disk's rate, computing takes arithmetic, and both can go on at once: the beginning of a
prompt depends on nothing after it, so it is computed while the rest is read, until they meet. Where the disk is fast
nothing is computed again; where it is slow nothing is read. Keys and values take κ bytes per token, so reading wins
from B > κ · (tokens per second of prefill) on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...memory.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Reuse:
    """A choice. Blocks from the first one on are computed, those after them read."""

    computed_blocks: int
    loaded_blocks: int
    seconds: float
    """Until keys and values of all of them are there."""


def reuse(
    blocks: int,
    *,
    block_tokens: int,
    block_nbytes: int,
    rate: float,
    prefill_s: Callable[[int], float],
    start_s: float = 0.0,
    at_once: bool = True,
) -> Reuse:
    """The split of a prefix with the least time; of equal ones the one that reads most, since it leaves cores free.

    Args:
        blocks: That the store has.
        block_tokens: Tokens of each.
        block_nbytes: Bytes of each.
        rate: Bytes per second at which they are read.
        prefill_s: Seconds of computing so many tokens from the beginning; never less for more tokens. Where weights are
            read for it, more than for the rest of the prompt, they count.
        start_s: Before the first byte arrives.
        at_once: Whether both go on at the same time; else it is one or the other.

    Raises:
        UsageError: the rate is not positive, or there is a negative number of blocks.
    """
    if blocks < 0 or rate <= 0:
        raise UsageError(f"{blocks} blocks at {rate} bytes per second: the one cannot be negative, the other not 0")

    def choice(computed: int) -> Reuse:
        loaded = blocks - computed
        computing_s = prefill_s(computed * block_tokens) if computed else 0.0
        loading_s = start_s + loaded * block_nbytes / rate if loaded else 0.0
        return Reuse(computed_blocks=computed, loaded_blocks=loaded, seconds=max(computing_s, loading_s))

    if not at_once:
        return min((choice(0), choice(blocks)), key=lambda one: one.seconds)
    # Computing grows with its part and loading shrinks: the best is beside where they meet.
    low, high = 0, blocks
    while low < high:
        middle = (low + high) // 2
        loading_s = start_s + (blocks - middle) * block_nbytes / rate if middle < blocks else 0.0
        if (prefill_s(middle * block_tokens) if middle else 0.0) < loading_s:
            low = middle + 1
        else:
            high = middle
    best = min((choice(count) for count in {max(low - 1, 0), low}), key=lambda one: (one.seconds, one.computed_blocks))
    return choice(0) if choice(0).seconds <= best.seconds else best
