"""How a read is cut into requests: large ones, but so many that a drive works on one block at a time.

A drive that has requests of two blocks shares its rate between them, and both arrive late, together: who waits for the
first gets it no sooner than the second, and then computes with both while the drive rests. With as many requests of the
first as there are threads, those of the second queue behind.
"""

from __future__ import annotations

from typing import Final

from .arena import round_up

THREADS: Final = 8
"""Requests under way per drive."""
CHUNK: Final = 4 * 2**20
"""Bytes of a request, at most."""
FINEST: Final = 2**20
"""At least, where there is more to read: smaller ones cost drives some of their rate."""


def request_nbytes(
    nbytes: int, *, threads: int = THREADS, chunk_nbytes: int = CHUNK, finest_nbytes: int = FINEST
) -> int:
    """Bytes of each request of a read of `nbytes`; the last one may be shorter. A multiple of the page."""
    return min(chunk_nbytes, max(round_up(-(-nbytes // threads)), finest_nbytes))
