"""Giving memory that the C allocator has free, but keeps, back to the system."""

from __future__ import annotations

import ctypes


def return_free_memory() -> None:
    """Trim the heap, where the C library can (glibc). Takes milliseconds: for the end of a load, never for a run."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
