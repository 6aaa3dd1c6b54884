"""A prefix store from outside: what is in it, and whether it is what was written. Takes no lock, changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import PenstockError, StoreError
from ..layout import FileSpan
from ..store.files import StoreFiles, SystemFiles
from ..store.folder import NEW
from ..store.reading import BlockReader
from .folder import OVERHEAD_NBYTES, FoundSegment, PrefixLabel, file_nbytes, read_label, read_segment, segment_names
from .index import Index

Folder = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixStats:
    """Figures of a prefix store. Sizes in bytes."""

    folder: str
    capacity_nbytes: int
    used_nbytes: int
    """Of all its files."""
    segments: int
    blocks: int
    tokens: int
    """Of all blocks."""
    payload_nbytes: int
    identities: int
    """Models, with all that their keys and values depend on."""
    unreachable_segments: int
    """That follow a block that is gone; `prune` removes them."""
    bad_segments: int
    """Whose header cannot be read."""
    left_over_files: int
    """Of a process that was killed, or that is writing now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadPart:
    """A block, or a whole segment, that is not what was written."""

    path: str
    offset: int
    nbytes: int
    """0 for the header."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixVerifyReport:
    """What became of what was stored."""

    segments: int
    blocks: int
    """All were read."""
    nbytes: int
    """Their payload."""
    bad: tuple[BadPart, ...]

    @property
    def good(self) -> bool:
        """Whether all is what was written."""
        return not self.bad


def stats(folder: Folder, *, files: StoreFiles | None = None) -> PrefixStats:
    """Figures of a store, which somebody may be writing meanwhile. Reads headers only.

    Raises:
        StoreError, DiskError: there is no store, or it cannot be read.
    """
    files = files or SystemFiles()
    label, found, bad = _look(files, Path(folder))
    index = Index()
    for segment in found:
        index.add(segment.record, segment.path, segment.tick)
    blocks = [block for segment in found for block in segment.record.blocks]
    return PrefixStats(
        folder=os.fspath(folder),
        capacity_nbytes=label.capacity_nbytes,
        used_nbytes=OVERHEAD_NBYTES
        + index.nbytes
        + sum(file_nbytes(files, Path(folder), os.path.basename(part.path)) for part in bad),
        segments=len(found),
        blocks=len(blocks),
        tokens=sum(segment.record.block_tokens * len(segment.record.blocks) for segment in found),
        payload_nbytes=sum(block.nbytes for block in blocks),
        identities=len({segment.record.root for segment in found}),
        unreachable_segments=len(index.orphans()),
        bad_segments=len(bad),
        left_over_files=sum(name.endswith(NEW) for name in files.names(os.fspath(folder))),
    )


def verify(
    folder: Folder, *, files: StoreFiles | None = None, on_block: Callable[[], None] | None = None
) -> PrefixVerifyReport:
    """Read every block from the drive and compare checksums. What somebody removes meanwhile is not counted.

    Raises:
        StoreError, DiskError: there is no store, or it cannot be read.
    """
    _, found, bad = _look(files or SystemFiles(), Path(folder))
    blocks = nbytes = 0
    for segment in found:
        reader = BlockReader()  # one each, so that no file that was removed is kept open
        try:
            for block in segment.record.blocks:
                reason = _examine(
                    reader, FileSpan(path=segment.path, offset=block.offset, nbytes=block.nbytes), block.checksum
                )
                if reason and not os.path.exists(segment.path):
                    break
                blocks, nbytes = blocks + 1, nbytes + block.nbytes
                if reason:
                    bad.append(BadPart(path=segment.path, offset=block.offset, nbytes=block.nbytes, reason=reason))
                if on_block is not None:
                    on_block()
        finally:
            reader.close()
    return PrefixVerifyReport(segments=len(found), blocks=blocks, nbytes=nbytes, bad=tuple(bad))


def _examine(reader: BlockReader, span: FileSpan, expected: int) -> str:
    try:
        found = reader.checksum(span)
    except PenstockError as error:
        return str(error)
    return "" if found == expected else f"its checksum is {found:016x} and was {expected:016x} when it was stored"


def _look(files: StoreFiles, folder: Path) -> tuple[PrefixLabel, list[FoundSegment], list[BadPart]]:
    label = read_label(files, folder)
    if label is None:
        raise StoreError(f"there is no prefix store in {folder}: name the folder that one was made in")
    found: list[FoundSegment] = []
    bad: list[BadPart] = []
    for name in sorted(segment_names(files, folder)):
        try:
            found.append(read_segment(files, folder, name))
        except FileNotFoundError:
            continue
        except (PenstockError, OSError) as error:
            bad.append(BadPart(path=str(folder / name), offset=0, nbytes=0, reason=str(error)))
    return label, found, bad
