"""How large the last cache before memory is: what probes of memory must exceed."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_UNITS: Final = {"K": 2**10, "M": 2**20, "G": 2**30}
UNKNOWN_NBYTES: Final = 32 * 2**20
"""Assumed where the kernel does not tell."""


def last_level_cache(sys_root: Path = Path("/sys")) -> int:
    """Bytes of the largest cache of the first processor (on machines with several, each has one of its own)."""
    folder = sys_root / "devices" / "system" / "cpu" / "cpu0" / "cache"
    sizes = [_size(path) for path in folder.glob("index*/size")]
    return max(sizes, default=0) or UNKNOWN_NBYTES


def _size(path: Path) -> int:
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    number, unit = text.rstrip("KMG"), text[-1:]
    return int(number) * _UNITS.get(unit, 1) if number.isdecimal() else 0
