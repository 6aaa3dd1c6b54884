"""What all policies share: who is always kept, and how the best of the rest are taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ....memory.errors import UsageError
from .policy import FloatArray, IntArray, Selection, Setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Units among which a policy chooses: those from `start` to `stop`. All others of `count` are kept."""

    start: int
    stop: int
    count: int
    room: int
    """How many of them may be chosen."""

    def select(self, scores: FloatArray, *, unit_tokens: int, scored_nbytes: int) -> Selection:
        """The best of each head by `scores` [kv_heads, candidates], of equal ones the first."""
        return Selection(
            ids=tuple(self.with_kept(best(row, self.room) + self.start) for row in scores),
            unit_tokens=unit_tokens,
            scored_nbytes=scored_nbytes,
        )

    def with_kept(self, chosen: IntArray) -> IntArray:
        """Chosen units, and those that are always kept."""
        return np.concatenate([np.arange(self.start), np.sort(chosen), np.arange(self.stop, self.count)])


def token_candidates(setting: Setting, tokens: int) -> Candidates | None:
    """Among which tokens to choose; None where all fit the budget."""
    if tokens <= setting.budget_tokens:
        return None
    return Candidates(
        start=setting.sinks,
        stop=tokens - setting.recent,
        count=tokens,
        room=setting.budget_tokens - setting.sinks - setting.recent,
    )


def block_candidates(setting: Setting, tokens: int) -> Candidates | None:
    """Among which blocks to choose; None where all fit the budget. The last block, which may not be full, is kept."""
    size = setting.block_tokens
    if tokens <= setting.budget_tokens:
        return None
    count = -(-tokens // size)
    start, stop = -(-setting.sinks // size), (tokens - setting.recent) // size
    kept = start + count - stop
    return Candidates(
        start=start, stop=max(start, stop), count=count, room=max(0, setting.budget_tokens // size - kept)
    )


def require_blocks(setting: Setting) -> None:
    """See that what is always kept is within the budget in whole blocks as well.

    Raises:
        UsageError: it is not.
    """
    size = setting.block_tokens
    kept = (-(-setting.sinks // size) + -(-(setting.recent - 1) // size) + 1) * size
    if setting.budget_tokens < kept:
        raise UsageError(
            f"a budget of {setting.budget_tokens} tokens is less than the {kept} of the blocks of {size} tokens that "
            "are always kept: give a larger budget, or smaller blocks"
        )


def everything(kv_heads: int, tokens: int) -> Selection:
    """All tokens, chosen without looking at anything."""
    return Selection(ids=(np.arange(tokens),) * kv_heads, unit_tokens=1, scored_nbytes=0)


def best(scores: FloatArray, count: int) -> IntArray:
    """Numbers of the largest ones, ascending; of equal ones the first. In time that grows with their number alone."""
    if count >= len(scores):
        return np.arange(len(scores))
    if count <= 0:
        return np.arange(0)
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > least)
    equal = np.flatnonzero(scores == least)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))
