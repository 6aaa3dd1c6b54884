"""Giving back what nobody can find in a prefix store, and what is more than it is to hold."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import StoreError
from ..store.files import StoreFiles, SystemFiles
from .audit import Folder, stats
from .folder import is_prefix_store
from .store import PrefixStore


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixPruneReport:
    """What was given back."""

    removed_segments: int
    """Bad ones, those that nobody can find, and those used longest ago that exceed the capacity."""
    left_over_files: int
    freed_nbytes: int
    """Of segments."""
    used_nbytes: int
    """What is left, of all files."""
    capacity_nbytes: int


def prune(folder: Folder, capacity_nbytes: int | None = None, *, files: StoreFiles | None = None) -> PrefixPruneReport:
    """Remove left-over files, segments with a damaged header, and those that follow a block that is gone.

    Args:
        folder: Of the store.
        capacity_nbytes: A new capacity, from now on.
        files: The filesystem; a seam for fault injection.

    Raises:
        UsageError, StoreError, DiskError: see `PrefixStore`.
    """
    if not is_prefix_store(folder):
        raise StoreError(f"there is no prefix store in {folder}: name the folder that one was made in")
    files = files or SystemFiles()
    before = stats(folder, files=files)
    with PrefixStore(folder, capacity_nbytes, files=files) as store:
        store.remove_unreachable()
        after = stats(folder, files=files)
        return PrefixPruneReport(
            removed_segments=before.segments + before.bad_segments - after.segments - after.bad_segments,
            left_over_files=len(store.left_over),
            freed_nbytes=before.used_nbytes - after.used_nbytes,
            used_nbytes=after.used_nbytes,
            capacity_nbytes=after.capacity_nbytes,
        )
