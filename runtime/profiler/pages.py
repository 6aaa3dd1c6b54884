"""Resident pages of this process: as the kernel counts them, less those that it counts more than once."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Final

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
FEW: Final = 8 << 20
"""Shared bytes that are not worth a look at the mappings, which takes half a millisecond."""
TRIES: Final = 4


def resident_nbytes() -> int:
    """Bytes of all resident pages.

    The kernel's count has a shared page once for every place where it is mapped. A piece of memory that is mapped again
    and again, as the probe of a product in pieces does, would be told as many times its size.
    """
    resident, shared = _status()
    for _ in range(TRIES):
        if shared <= FEW:
            break
        with open("/proc/self/maps") as file:
            mapped, distinct = mapped_nbytes(file.read())
        before, (resident, shared) = shared, _status()
        if abs(shared - before) <= FEW:  # else the mappings came or went meanwhile
            return resident - max(0, min(mapped, shared) - distinct)
    return resident


def _status() -> tuple[int, int]:
    with open("/proc/self/status", "rb") as file:
        found = status_nbytes(file.read())
    return found[b"VmRSS"], found[b"RssShmem"]


def anonymous_nbytes() -> int:
    """Bytes of resident pages that no file backs: all, less those shared or mapped from files."""
    with open("/proc/self/statm", "rb") as file:
        fields = [int(field) for field in file.read().split()]
    return (fields[1] - fields[2]) * PAGE


def status_nbytes(text: bytes) -> dict[bytes, int]:
    """The sizes in a /proc/PID/status."""
    fields = (line.split() for line in text.splitlines())
    return {field[0][:-1]: int(field[1]) * 1024 for field in fields if len(field) == 3 and field[2] == b"kB"}


def mapped_nbytes(maps: str) -> tuple[int, int]:
    """Of memory files that a /proc/PID/maps has more than once: (bytes mapped, bytes that are distinct)."""
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for line in maps.splitlines():
        if "/memfd:" in line:
            addresses, _, offset, _, inode, _ = line.split(maxsplit=5)
            low, high = (int(address, 16) for address in addresses.split("-"))
            first = int(offset, 16)
            spans[inode].append((first, first + high - low))
    several = [found for found in spans.values() if len(found) > 1]
    return sum(stop - start for found in several for start, stop in found), sum(map(_union_nbytes, several))


def _union_nbytes(spans: list[tuple[int, int]]) -> int:
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total
