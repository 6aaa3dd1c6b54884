"""Sizes as people write them: "8GiB" is 8 * 2^30 bytes, "8GB" is 8 * 10^9, "8G" is an error that suggests both."""

from __future__ import annotations

import operator
import re
from fractions import Fraction
from typing import Final

from .memory.errors import UsageError

UNITS: Final[dict[str, int]] = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "PB": 10**15,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "PiB": 2**50,
}
"""Bytes per unit. Case matters."""

_LARGEST: Final = 2**63 - 1
_SIZE: Final = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?([A-Za-z]*)")
_READINGS: Final = {
    "k": "{0}KiB (2^10) or {0}kB (10^3)",
    "m": "{0}MiB (2^20) or {0}MB (10^6)",
    "g": "{0}GiB (2^30) or {0}GB (10^9)",
    "t": "{0}TiB (2^40) or {0}TB (10^12)",
    "p": "{0}PiB (2^50) or {0}PB (10^15)",
}


def parse_size(size: int | str) -> int:
    """Bytes in `size`: an int (or anything that is one exactly, such as a numpy integer) counts bytes; a string is a
    number and a unit of `UNITS`, or digits alone for bytes. Fractions of a byte are dropped.

    Raises:
        UsageError: no such unit, not a number, negative, or more than 2^63 - 1; the message suggests what was meant.
    """
    nbytes = _parse_text(size) if isinstance(size, str) else _parse_number(size)
    if nbytes < 0:
        raise UsageError(f"a size cannot be negative: {size}")
    if nbytes > _LARGEST:
        raise UsageError(f"{size!r} is more than any machine has (2^63 - 1 bytes)")
    return nbytes


def format_size(nbytes: int) -> str:
    """`nbytes` for people, in the largest binary unit that leaves at least 1: "3.00 GiB", "512 B"."""
    for unit in ("PiB", "TiB", "GiB", "MiB", "KiB"):
        if abs(nbytes) >= UNITS[unit]:
            return f"{nbytes / UNITS[unit]:.2f} {unit}"
    return f"{nbytes} B"


def _parse_number(size: int) -> int:
    if isinstance(size, bool):
        raise UsageError(f"a size is a number of bytes or a string such as '8GiB', not {size}")
    try:
        return operator.index(size)
    except TypeError as error:
        raise UsageError(f"a size is a whole number of bytes or a string such as '8GiB', not {size!r}") from error


def _parse_text(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size: write a number and a unit, for example 8GiB (2^30) or 8GB (10^9)")
    number, unit = match.groups()
    if unit in UNITS:
        return int(Fraction(number) * UNITS[unit])
    if unit == "":
        if "." in number:
            raise UsageError(f"{text!r} has no unit: write {_READINGS['g'].format(number)}")
        return int(number)
    readings = _READINGS.get(unit[0].lower()) if re.fullmatch(r".i?b?", unit, re.IGNORECASE) else None
    if readings is None:
        raise UsageError(f"{text!r}: there is no unit {unit!r}. Units are {', '.join(UNITS)}, in exactly this case.")
    raise UsageError(f"{text!r} is ambiguous: write {readings.format(number)}")
