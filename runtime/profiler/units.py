"""Figures of a profile in words: sizes, times, shares, rates."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Bytes, in the largest binary unit that leaves at least 1: "3.00 GiB", "512 B"."""
    for unit, nbytes_per_unit in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(nbytes) >= nbytes_per_unit:
            return f"{nbytes / nbytes_per_unit:.2f} {unit}"
    return f"{nbytes:.0f} B"


def duration(ns: float) -> str:
    """Nanoseconds, in the largest unit that leaves at least 1: "1.23 s", "45.00 ms", "7.00 µs", "12 ns"."""
    for unit, ns_per_unit in (("s", 1_000_000_000), ("ms", 1_000_000), ("µs", 1_000)):
        if abs(ns) >= ns_per_unit:
            return f"{ns / ns_per_unit:.2f} {unit}"
    return f"{ns:.0f} ns"


def share(value: float) -> str:
    """A share of 1, in per cent: "61.0%"."""
    return f"{value * 100:.1f}%"


def rate(nbytes_per_s: float) -> str:
    """Bytes per second: "1.80 GiB/s"."""
    return f"{size(nbytes_per_s)}/s"
