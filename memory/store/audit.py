"""Reading a whole store back, from outside, also while it is being written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..disk import DiskEngine
from .files import StoreFiles, SystemFiles
from .opening import Folder, look
from .reading import BadBlock, check_blocks_read


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What became of the committed blocks."""

    commit: int
    blocks: int
    """With a committed state; all of them were read."""
    nbytes: int
    """Their payload."""
    bad: tuple[BadBlock, ...]
    doubt: str
    """What is wrong with the newest manifest, so that the one before was taken. "" where nothing is."""

    @property
    def good(self) -> bool:
        """Whether the last commit is whole."""
        return not self.bad and not self.doubt


def verify(
    folders: Folder | Sequence[Folder],
    *,
    files: StoreFiles | None = None,
    engine: DiskEngine | None = None,
    on_block: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Read every committed block from the drive and compare checksums. Takes no lock and writes nothing.

    While somebody commits, a block that seems bad may have been written again: it is bad only if the newest manifest
    still says what the one before the read did, since no slot is written that the published manifest names.

    Args:
        folders: The home folder, or all folders of the store.
        files: The filesystem that manifests are read from; a seam for fault injection.
        engine: Reads the blocks; by default one of its own, with 32 MiB of buffer.
        on_block: Called after each block, for a progress line.

    Raises:
        StoreError, DiskError: the store cannot be opened, see `BlockStore.open`.
    """
    files = files or SystemFiles()
    found, facts = look(files, folders)
    manifest = found.manifest
    bad = check_blocks_read(manifest, facts.slotmap, engine=engine, on_block=on_block)
    while bad:
        latest, _ = look(files, folders)
        changed = [one.block for one in bad if latest.manifest.blocks[one.block] != manifest.blocks[one.block]]
        found, manifest = latest, latest.manifest
        if not changed:
            break
        unchanged = [one for one in bad if one.block not in changed]
        bad = unchanged + check_blocks_read(manifest, facts.slotmap, changed, engine=engine)
    committed = [block for block in manifest.blocks if block.written]
    return VerifyReport(
        commit=manifest.commit,
        blocks=len(committed),
        nbytes=sum(block.nbytes for block in committed),
        bad=tuple(sorted(bad, key=lambda one: one.block)),
        doubt=found.doubt,
    )
