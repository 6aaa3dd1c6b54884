"""The folder of a prefix store: who may look into it, what it is called, how large it may become, what is in it.

penstock-prefixes         the label: capacity
<32 hex digits>.kv        segments
*.new                     being written, or left by a process that was killed
penstock-prefixes.lock    held by the one who writes
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from ..arena import PAGE
from ..errors import DiskError, ScratchBusyError, StoreBusyError, StoreDamagedError, StoreError, UsageError
from ..filelock import FileLock
from ..store.files import StoreFiles, read_all
from ..store.folder import NEW, open_plain, publish_new, read_file, remove, sync_folder, write_new
from ..store.sealed import seal, unseal
from .segment import HEADER_NBYTES, SegmentRecord, unpack_header

logger = logging.getLogger(__name__)

LABEL: Final = "penstock-prefixes"
LOCK: Final = "penstock-prefixes.lock"
SUFFIX: Final = ".kv"
OVERHEAD_NBYTES: Final = 3 * PAGE
"""Of a store without segments: label and lock."""
LEAST_NBYTES: Final = OVERHEAD_NBYTES + HEADER_NBYTES + PAGE
"""No store is smaller: it could not hold a single block."""
_KIND: Final = b"kvpx"
_NAME: Final = re.compile(r"[0-9a-f]{32}\.kv")


class PrefixLabel(msgspec.Struct, frozen=True, kw_only=True):
    """What the label says."""

    capacity_nbytes: int
    """Of all files of the store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundSegment:
    """A segment's file and what it is."""

    path: str
    record: SegmentRecord
    tick: int


def is_prefix_store(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is one, by its label; whether it can be read is another matter."""
    return os.path.isfile(os.path.join(folder, LABEL))


def make_folder(folder: Path) -> None:
    """Make the folder, and those above it, if it is not there.

    Raises:
        DiskError: it cannot be made.
    """
    if not folder.exists():
        missing = [folder, *(parent for parent in folder.parents if not parent.exists())]
        for path in reversed(missing):
            try:
                path.mkdir(mode=0o700)
            except OSError as error:
                raise DiskError(f"cannot make {path}: {error.strerror}. Choose another folder.") from error


def require_empty(files: StoreFiles, folder: Path) -> None:
    """See that nothing else is in a folder that is to become a store.

    Raises:
        StoreError: something is.
    """
    others = [name for name in files.names(str(folder)) if name not in (LABEL + NEW, LOCK)]
    if others:
        raise StoreError(
            f"{folder} is no prefix store and not empty ({len(others)} files, {others[0]} among them): name another "
            "folder"
        )


def require_private(folder: Path) -> None:
    """See that only this user may look into a folder: who reads keys and values can tell the prompts.

    Raises:
        StoreError: it is another user's, or others may enter it.
    """
    try:
        status = folder.stat()
    except OSError as error:
        raise StoreError(f"{folder} cannot be looked into: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise StoreError(f"{folder} is not a folder: name another one")
    if status.st_uid != os.geteuid():
        raise StoreError(f"{folder} belongs to another user: name a folder of your own")
    if status.st_mode & 0o077:
        raise StoreError(
            f"{folder} may be entered by others (mode {stat.S_IMODE(status.st_mode):o}), and prompts can be told from "
            f"what is in it: run `chmod 700 {folder}`, or name another folder"
        )


def read_label(files: StoreFiles, folder: Path) -> PrefixLabel | None:
    """The label; None where there is none.

    Raises:
        StoreDamagedError: it is damaged.
        StoreVersionError: the store is of another version of the format.
        DiskError: it cannot be read.
    """
    path = str(folder / LABEL)
    try:
        body = unseal(_KIND, read_file(files, path), path).body
        return msgspec.msgpack.decode(body, type=PrefixLabel)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (StoreDamagedError, msgspec.DecodeError) as error:
        raise StoreDamagedError(
            f"{error}. Nothing of a prefix store is needed: remove {folder}, and it is filled again"
        ) from error


def write_label(files: StoreFiles, folder: Path, capacity_nbytes: int) -> None:
    """Set the capacity, durably.

    Raises:
        UsageError: no store can be that small.
        DiskError: it cannot be written.
    """
    if capacity_nbytes < LEAST_NBYTES:
        raise UsageError(f"a prefix store of {capacity_nbytes} bytes holds nothing: give it {LEAST_NBYTES} at least")
    path = str(folder / LABEL)
    write_new(files, path, seal(_KIND, msgspec.msgpack.encode(PrefixLabel(capacity_nbytes=capacity_nbytes))))
    publish_new(files, path)


def lock_folder(folder: Path) -> FileLock:
    """The lock of the one who writes.

    Raises:
        StoreBusyError: somebody else writes; the message names them.
        DiskError: it cannot be locked there.
    """
    try:
        lock = FileLock.acquire(folder / LOCK)
    except ScratchBusyError as error:
        raise StoreBusyError(f"{error} Or open it with readonly=True: any number may read.") from error
    assert lock is not None, folder
    return lock


def new_name() -> str:
    """Of a segment; never used twice, so that who knows a file by its name never reads another one."""
    return secrets.token_hex(16) + SUFFIX


def segment_names(files: StoreFiles, folder: Path) -> set[str]:
    """Files that are called like segments.

    Raises:
        DiskError: the folder cannot be read.
    """
    try:
        return {name for name in files.names(str(folder)) if _NAME.fullmatch(name)}
    except OSError as error:
        raise DiskError(f"cannot look into {folder}: {error.strerror}") from error


def tick_of(status: os.stat_result) -> int:
    """When a segment was used last: a count, kept as the time of its file's last change."""
    return max(0, int(status.st_mtime))


def file_nbytes(files: StoreFiles, folder: Path, name: str) -> int:
    """Length of a file; 0 for what is gone, or is none and takes no room of the store's."""
    try:
        status = files.status(str(folder / name))
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def read_segment(files: StoreFiles, folder: Path, name: str) -> FoundSegment:
    """What a segment's file says of itself.

    Raises:
        FileNotFoundError: it is gone.
        StoreError, DiskError: it is no segment, or damaged, or cannot be read.
    """
    path = str(folder / name)
    fd = open_plain(files, path, os.O_RDONLY)
    try:
        status = files.stat(fd)
        header = read_all(files, fd, path, min(HEADER_NBYTES, status.st_size), 0)
        return FoundSegment(
            path=path,
            record=unpack_header(header, name, status.st_size),
            tick=tick_of(status),
        )
    finally:
        files.close(fd)


def remove_left_over(files: StoreFiles, folder: Path) -> tuple[str, ...]:
    """Remove what a killed process was writing. For the one who holds the lock.

    Raises:
        DiskError: one stays.
    """
    names = [name for name in files.names(str(folder)) if name.endswith(NEW)]
    ours = [name for name in names if _NAME.fullmatch(name.removesuffix(NEW)) or name == LABEL + NEW]
    removed = tuple(str(folder / name) for name in ours if remove(files, str(folder / name)))
    if removed:
        sync_folder(files, str(folder))
    return removed
