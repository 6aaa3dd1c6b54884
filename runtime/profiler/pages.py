"""Resident pages of this process, as the kernel counts them."""

from __future__ import annotations

import os
from typing import Final

PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def resident_nbytes() -> int:
    """Bytes of all resident pages."""
    return _fields()[1] * PAGE


def anonymous_nbytes() -> int:
    """Bytes of resident pages that no file backs: all, less those shared or mapped from files."""
    fields = _fields()
    return (fields[1] - fields[2]) * PAGE


def _fields() -> list[int]:
    with open("/proc/self/statm", "rb") as file:
        return [int(field) for field in file.read().split()]
