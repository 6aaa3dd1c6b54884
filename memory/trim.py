"""What the C allocator does with memory that is free: gives it back to the system, or keeps it."""

from __future__ import annotations

import ctypes
import logging
from typing import Final

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
"""Of glibc's malloc.h."""
ALONE: Final = 1 << 20
"""Bytes of an allocation that the system gives and takes back alone: holes that short-lived tensors would leave between
those that stay hold more memory than all of these need."""


def return_free_memory() -> None:
    """Trim the heap, where the C library can (glibc). Takes milliseconds: for the end of a load, never for a run."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def map_alone(nbytes: int = ALONE) -> bool:
    """Have the C library (glibc) map each allocation of so many bytes or more alone, and give it back when it is freed.

    Left to itself it learns from what is freed to keep up to 32 MiB in its heap; between tensors that live long, those
    of a training step or of a prefill then leave holes of several times what is in use. The price is that the system
    clears the pages of each such allocation anew. It holds for the whole process, and for good.

    Returns:
        Whether it does: False where the C library knows no such thing.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    done = bool(set_option(M_MMAP_THRESHOLD, nbytes)) and bool(set_option(M_TRIM_THRESHOLD, 4 * nbytes))
    logger.debug("allocations of %d bytes or more are mapped alone: %s", nbytes, done)
    return done
