"""What a cache tells of itself."""

from __future__ import annotations

from dataclasses import dataclass

from ...scheduler.kv.chosen import ChosenStatistics


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixFigures:
    """What prefix stores had of a cache's prompts, and what became of that."""

    hit_tokens: int = 0
    """That were found."""
    read_tokens: int = 0
    """Of them, those that were read."""
    recomputed_tokens: int = 0
    """Of them, those that were left to be computed, because that was expected to be faster. The others were bad."""
    read_nbytes: int = 0
    read_all_s: float | None = None
    """Of the last hit: what was expected until the prompt is there, with all of the hit read; None where that was not
    known, and all was read."""
    compute_all_s: float | None = None
    """The same with nothing read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvStatistics:
    """What a cache holds at this moment, and what it has moved, in bytes. Those of tiers are whole slots."""

    tokens: int
    """Positions of each row, padding counted."""
    rows: int
    kv_nbytes: int
    """Keys and values of all tokens, as if nothing were shared."""
    host_nbytes: int
    """Of blocks in host memory."""
    disk_nbytes: int
    """Of blocks on disk, those that faster tiers have too among them."""
    device_nbytes: int
    """Of blocks in the device's memory."""
    device_budget_nbytes: int
    """0 where nothing is kept there."""
    host_budget_nbytes: int
    arena_nbytes: int
    """Of the one allocation that all blocks and reads go to."""
    read_nbytes: int
    """From disk."""
    written_nbytes: int
    """To disk."""
    sent_nbytes: int
    """From the device to host memory."""
    fetched_nbytes: int
    """From host memory to the device, to be attended to there."""
    appended_nbytes: int
    """Keys and values of tokens that were added."""
    copied_nbytes: int
    """Beginnings of blocks that were copied, because rows parted."""
    codec: str | None = None
    """Of full blocks, which are lossy then; None where they are as they were made."""
    prefix: PrefixFigures | None = None
    """What came of prefix stores; None where they had nothing."""
    chosen: ChosenStatistics | None = None
    """What a policy of selection made of it; None where all is attended to."""
