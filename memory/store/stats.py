"""What a store takes and has taken."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from .datafiles import DataFiles
from .files import StoreFiles, SystemFiles
from .opening import Folder, look
from .slotmap import SLOTS


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStats:
    """Figures of a store's last commit. All sizes in bytes."""

    folders: tuple[str, ...]
    identity: str
    commit: int
    """Number of the last commit."""
    metadata: bytes
    blocks: int
    committed_blocks: int
    """Blocks that the last commit has a state of: one slot each is in use."""
    slots: int
    """Two per block."""
    changed_blocks: int
    """Blocks that the last commit wrote."""
    payload_nbytes: int
    """Of all blocks, once."""
    nbytes_by_kind: dict[str, int]
    file_nbytes: int
    """Length of the data files."""
    allocated_nbytes: int
    """What the data files take of their drives now; less than their length after `prune`."""
    manifest_nbytes: int
    written_nbytes: int
    """Bytes written from the making of the store to its last commit."""


def stats(folders: Folder | Sequence[Folder], *, files: StoreFiles | None = None) -> StoreStats:
    """Figures of a store, which somebody may be writing meanwhile. Takes no lock and reads no block.

    Raises:
        StoreError, DiskError: the store cannot be opened, see `BlockStore.open`.
    """
    files = files or SystemFiles()
    found, facts = look(files, folders)
    manifest = found.manifest
    data = DataFiles.open(files, facts.slotmap, readonly=True)
    try:
        allocated_nbytes = data.allocated_nbytes()
    finally:
        data.close()
    by_kind: dict[str, int] = {}
    for block in manifest.blocks:
        by_kind[block.kind] = by_kind.get(block.kind, 0) + block.nbytes
    return StoreStats(
        folders=tuple(os.fspath(folder) for folder in facts.folders),
        identity=manifest.identity,
        commit=manifest.commit,
        metadata=manifest.metadata,
        blocks=len(manifest.blocks),
        committed_blocks=sum(block.written for block in manifest.blocks),
        slots=SLOTS * len(manifest.blocks),
        changed_blocks=sum(block.written and block.version == manifest.commit for block in manifest.blocks),
        payload_nbytes=sum(by_kind.values()),
        nbytes_by_kind=by_kind,
        file_nbytes=sum(facts.slotmap.drive_nbytes()),
        allocated_nbytes=allocated_nbytes,
        manifest_nbytes=found.nbytes,
        written_nbytes=manifest.written_nbytes + found.nbytes,
    )
