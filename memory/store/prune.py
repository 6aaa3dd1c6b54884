"""Giving back what no committed state needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from ..arena import round_up
from ..layout import FileSpan
from .files import StoreFiles, SystemFiles
from .folder import PREVIOUS, remove, sync_folder
from .opening import Folder, open_parts
from .slotmap import SLOTS


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneReport:
    """What was given back."""

    commit: int
    slots: int
    """Slots that were emptied."""
    freed_nbytes: int
    """By how much the data files take less of their drives."""
    removed: tuple[str, ...]
    """Files that were removed."""


def prune(folders: Folder | Sequence[Folder], *, files: StoreFiles | None = None) -> PruneReport:
    """Empty the slots that the last commit does not name, and remove left-over files: for a run that is finished.

    The run can go on afterwards: opening the store takes the room again, if the drives still have it. The commit before
    the last, kept in case its manifest is damaged, is given up.

    Raises:
        StoreError, DiskError: the store cannot be opened, see `BlockStore.open`, or the filesystem cannot make holes.
    """
    files = files or SystemFiles()
    parts = open_parts(files, folders, identity=None, readonly=False, allocate=False)
    with ExitStack() as held:
        for lock in parts.locks:
            held.callback(lock.release)
        held.callback(parts.data.close)
        before = parts.data.allocated_nbytes()
        home = parts.facts.folders[0]
        previous = os.path.join(home, PREVIOUS)
        removed = [previous] if remove(files, previous) else []
        sync_folder(files, home)  # before its slots are emptied
        slots = 0
        slotmap = parts.facts.slotmap
        for block, record in enumerate(parts.found.manifest.blocks):
            for slot in range(SLOTS):
                if slot != record.slot:
                    span = slotmap.span(block, slot)
                    parts.data.punch(FileSpan(path=span.path, offset=span.offset, nbytes=round_up(span.nbytes)))
                    slots += 1
        parts.data.sync(range(len(slotmap.paths)))
        return PruneReport(
            commit=parts.found.manifest.commit,
            slots=slots,
            freed_nbytes=max(0, before - parts.data.allocated_nbytes()),
            removed=(*parts.removed, *removed),
        )
