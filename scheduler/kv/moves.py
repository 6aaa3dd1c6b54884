"""What tiers ask a runtime to do: copy a block from a slot of one tier to a slot of another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """A copy on its way. Both slots are taken until `Tiers.finish`."""

    block: int
    source: int
    """Number of the tier that is read, 0 for the fastest."""
    source_slot: int
    target: int
    target_slot: int
    nbytes: int
    leaves: bool
    """Whether the copy that is read is given up afterwards, unless somebody needs it then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TierStatistics:
    """One tier at this moment, and what it has seen. Bytes are whole slots."""

    name: str
    budget_nbytes: int
    used_nbytes: int
    """Of copies that are there, and of those on their way to it."""
    peak_nbytes: int
    pinned_nbytes: int
    arrived_nbytes: int
    """Copied to it from other tiers."""
    dropped_nbytes: int
    """Given up without a copy, since a slower tier had the block."""
