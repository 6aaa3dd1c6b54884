"""The files of a store's folder, and how one of them is replaced so that it is always there and whole.

penstock-store        the label: this folder is a part of that store
blocks.data           two slots for each block; every folder has one
manifest              the last commit; only the home folder has one
manifest.previous     the commit before; some of its slots may hold newer bytes by now
*.new                 being written, or left by a process that was killed
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import DiskError, StoreDamagedError, StoreError
from ..files import disk_error
from .files import StoreFiles, read_all, write_all
from .manifest import Label, Manifest, unpack_label, unpack_manifest
from .sealed import MOST_NBYTES

logger = logging.getLogger(__name__)

LABEL: Final = "penstock-store"
DATA: Final = "blocks.data"
MANIFEST: Final = "manifest"
PREVIOUS: Final = "manifest.previous"
NEW: Final = ".new"
LOCK: Final = "penstock-store.lock"
OURS: Final = frozenset({LABEL, LABEL + NEW, DATA, MANIFEST, MANIFEST + NEW, PREVIOUS, LOCK})


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The manifest that a folder holds."""

    manifest: Manifest
    nbytes: int
    """Length of its file."""
    doubt: str
    """Why it may not be the last commit: then its blocks may have been overwritten. "" where there is no doubt."""


def read_file(files: StoreFiles, path: str) -> bytes:
    """A whole small file.

    Raises:
        FileNotFoundError: there is none.
        StoreError: it is no plain file.
        StoreDamagedError: it is absurdly long.
        DiskError: it cannot be read.
    """
    fd = open_plain(files, path, os.O_RDONLY)
    try:
        nbytes = files.stat(fd).st_size
        if nbytes > MOST_NBYTES:
            raise StoreDamagedError(f"{path} has {nbytes} bytes; a file of this kind has {MOST_NBYTES} at most")
        return read_all(files, fd, path, nbytes, 0)
    finally:
        files.close(fd)


def open_plain(files: StoreFiles, path: str, flags: int) -> int:
    """A descriptor of a file that must be a plain one.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        StoreError: it is something else than a plain file.
        DiskError: it cannot be opened.
    """
    try:
        fd = files.open(path, flags | os.O_NONBLOCK)  # to come back from a pipe that nobody writes to
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StoreError(f"{path} is a symbolic link; penstock makes none: put the file itself there") from error
        raise disk_error("open", path, 0, 0, error) from error
    if not stat.S_ISREG(files.stat(fd).st_mode):
        files.close(fd)
        raise StoreError(f"{path} is not a plain file; it was not made by penstock")
    return fd


def write_new(files: StoreFiles, path: str, data: bytes) -> None:
    """Write a new file beside `path`, durably, to be published there. On failure nothing is left.

    A failed fsync is not tried again: the system may have dropped the bytes and forgotten. The next attempt is a new
    file.

    Raises:
        DiskError: it cannot be written.
    """
    new = path + NEW
    remove(files, new)
    try:
        fd = files.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except OSError as error:
        raise disk_error("open", new, 0, len(data), error) from error
    try:
        try:
            write_all(files, fd, new, memoryview(data), 0)
            try:
                files.fsync(fd)
            except OSError as error:
                raise disk_error("fsync", new, 0, len(data), error) from error
        except BaseException:
            with suppress(OSError):  # what came before it is what is told
                files.close(fd)
            raise
        try:
            files.close(fd)
        except OSError as error:  # where filesystems over a network say what they could not write
            raise disk_error("close", new, 0, len(data), error) from error
    except DiskError:
        try:
            remove(files, new)
        except DiskError as error:
            logger.debug("%s", error)  # the next attempt removes it
        raise


def publish_new(files: StoreFiles, path: str, *, previous: str | None = None) -> None:
    """Let what `write_new` wrote take the place of `path`, durably; what was there goes on as `previous`, if named.

    Raises:
        DiskError: it is not known whether the new file or the old one will be there after a power failure.
    """
    if previous is not None:
        try:
            remove(files, previous)
            files.link(path, previous)
        except (OSError, DiskError) as error:  # a spare only, and not every filesystem has links
            logger.debug("%s is not kept as %s: %s", path, previous, error)
    try:
        files.rename(path + NEW, path)
    except OSError as error:
        raise disk_error("rename", path + NEW, 0, 0, error) from error
    sync_folder(files, os.path.dirname(path))


def sync_folder(files: StoreFiles, folder: str) -> None:
    """Bring a folder's names to the medium.

    Raises:
        DiskError: the drive failed.
    """
    try:
        fd = files.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            files.fsync(fd)
        finally:
            files.close(fd)
    except OSError as error:
        raise disk_error("fsync", folder, 0, 0, error) from error


def remove(files: StoreFiles, path: str) -> bool:
    """Remove a file of ours; False where there is none.

    Raises:
        DiskError: it is there and stays.
    """
    try:
        files.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise disk_error("remove", path, 0, 0, error) from error
    return True


def read_label(files: StoreFiles, folder: Path) -> Label:
    """The label of a folder.

    Raises:
        StoreError: the folder is not a part of a store.
        StoreDamagedError: the label is damaged.
        StoreVersionError: it is of another version of the format.
        DiskError: it cannot be read.
    """
    path = str(folder / LABEL)
    try:
        return unpack_label(read_file(files, path), path)
    except FileNotFoundError:
        what = "has no block store in it" if folder.is_dir() else "does not exist"
        raise StoreError(f"{folder} {what}: name the folder that the run was started with") from None
    except NotADirectoryError:
        raise StoreError(f"{folder} is not a folder: name the folder that the run was started with") from None


def read_manifest(files: StoreFiles, folder: Path) -> Found:
    """The newest manifest of a home folder that can be read.

    Raises:
        StoreError: there is none: the store was never finished.
        StoreDamagedError: there was one, and it is damaged or gone.
        StoreVersionError: it is of another version of the format.
        DiskError: it cannot be read.
    """
    path, previous = str(folder / MANIFEST), str(folder / PREVIOUS)
    try:
        return _read_one(files, path, "")
    except FileNotFoundError:
        doubt: StoreError = StoreDamagedError(f"{path} is missing")
        if not os.path.exists(previous):
            raise StoreError(
                f"{folder} has no commit: {path} is missing. Either it was removed, or the process that made the store "
                "was killed before it was finished. Bring the file back from a copy, or make the store again"
            ) from None
    except StoreDamagedError as error:
        doubt = error
    try:
        return _read_one(files, previous, str(doubt))
    except FileNotFoundError:
        raise StoreDamagedError(f"{doubt}; there is no {previous} either: bring one back from a copy") from doubt
    except StoreDamagedError as error:
        raise StoreDamagedError(f"{doubt}, and {error}: bring one of them back from a copy") from doubt


def _read_one(files: StoreFiles, path: str, doubt: str) -> Found:
    data = read_file(files, path)
    manifest, good_copies = unpack_manifest(data, path)
    if good_copies < 2:
        logger.warning("one of the two copies in %s is damaged; the other is used. Check the drive's health.", path)
    return Found(manifest=manifest, nbytes=len(data), doubt=doubt)
