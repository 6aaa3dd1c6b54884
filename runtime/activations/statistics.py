"""Totals of a store of activations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStatistics:
    """Totals since the store was made, and what it holds now."""

    out_nbytes: int
    """Copied out of the memory that computes."""
    in_nbytes: int
    """And back."""
    written_nbytes: int
    read_nbytes: int
    sent: int
    """Storages that were given to it."""
    returned: int
    """That came back."""
    stayed: int
    """That were wanted before they had left."""
    on_demand: int
    """That came back only when they were used: nothing had asked for them before."""
    kept_nbytes: int
    """That stay by the plan, now."""
    host_nbytes: int
    """Of the host arena, used now."""
    host_peak_nbytes: int
    file_nbytes: int
    """Of scratch files, used now."""
