"""The data files of a store: one per drive, of full length from the beginning, open for as long as the store is."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress

from ..errors import DoesNotFitError, StoreDamagedError
from ..files import disk_error
from ..layout import FileSpan
from .files import StoreFiles, read_all, write_all
from .folder import open_plain
from .slotmap import SlotMap

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DataFiles:
    """Open data files, by drive.

    They are opened before the first write and kept open: the system reports a failed write-back to the descriptors that
    were open when it happened, and to none that is opened afterwards.
    """

    def __init__(self, files: StoreFiles, slotmap: SlotMap) -> None:
        self._files = files
        self._slotmap = slotmap
        self._fds: list[int] = []

    @classmethod
    def open(cls, files: StoreFiles, slotmap: SlotMap, *, readonly: bool = False, allocate: bool = True) -> DataFiles:
        """Open what `make` made. `allocate` takes back from the drive what was pruned.

        Raises:
            StoreDamagedError: a file is missing, or not as long as it was made.
            StoreError: it is no plain file.
            DoesNotFitError: a drive has not enough room for what was pruned.
            DiskError: a file cannot be opened, for writing unless `readonly`.
        """
        made = cls(files, slotmap)
        try:
            for path, nbytes in zip(slotmap.paths, slotmap.drive_nbytes(), strict=True):
                made._fds.append(_open(files, path, os.O_RDONLY if readonly else os.O_RDWR))
                status = files.stat(made._fds[-1])
                if status.st_size != nbytes:
                    raise StoreDamagedError(
                        f"{path} has {status.st_size} bytes and had {nbytes} when the store was made: it was truncated "
                        "or replaced; bring it back from a copy"
                    )
                if allocate and not readonly and status.st_blocks * 512 < nbytes:
                    _allocate(files, made._fds[-1], path, nbytes)
        except BaseException:
            made.close()
            raise
        return made

    @classmethod
    def make(cls, files: StoreFiles, slotmap: SlotMap) -> DataFiles:
        """Make the files and take all their room from the drives now, so that a full disk is met now.

        Raises:
            DoesNotFitError: a drive has not enough room.
            DiskError: a file cannot be made.
        """
        made = cls(files, slotmap)
        try:
            for path, nbytes in zip(slotmap.paths, slotmap.drive_nbytes(), strict=True):
                try:
                    made._fds.append(files.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC))
                except OSError as error:
                    raise disk_error("open", path, 0, nbytes, error) from error
                _allocate(files, made._fds[-1], path, nbytes)
                try:
                    files.truncate(made._fds[-1], nbytes)
                    files.fsync(made._fds[-1])
                except OSError as error:
                    raise disk_error("fsync", path, 0, nbytes, error) from error
        except BaseException:
            made.close()
            raise
        return made

    def sync(self, drives: Iterable[int]) -> None:
        """Bring what was written to these drives to the medium.

        Raises:
            DiskError: it may be lost, even if another fsync succeeds: the system reports a lost page once.
        """
        for drive in drives:
            try:
                self._files.fdatasync(self._fds[drive])
            except OSError as error:
                path = self._slotmap.paths[drive]
                raise disk_error("fsync", path, 0, self._slotmap.drive_nbytes()[drive], error) from error

    def read(self, span: FileSpan) -> bytes:
        """The bytes of a span, through the page cache."""
        return read_all(self._files, self._fd(span), span.path, span.nbytes, span.offset)

    def write(self, span: FileSpan, data: memoryview) -> None:
        """Write a span, through the page cache."""
        write_all(self._files, self._fd(span), span.path, data, span.offset)

    def punch(self, span: FileSpan) -> None:
        """Give a span back to its drive.

        Raises:
            DiskError: the filesystem cannot do that, or the drive failed.
        """
        try:
            self._files.punch(self._fd(span), span.offset, span.nbytes)
        except OSError as error:
            raise disk_error("punch a hole of", span.path, span.offset, span.nbytes, error) from error

    def allocated_nbytes(self) -> int:
        """What the files take of their drives."""
        return sum(self._files.stat(fd).st_blocks * 512 for fd in self._fds)

    def close(self) -> None:
        """Close the files."""
        fds, self._fds = self._fds, []
        for fd in fds:
            with suppress(OSError):  # what matters was synced, and its errors were raised there
                self._files.close(fd)

    def _fd(self, span: FileSpan) -> int:
        return self._fds[self._slotmap.paths.index(span.path)]


def _open(files: StoreFiles, path: str, flags: int) -> int:
    try:
        return open_plain(files, path, flags)
    except FileNotFoundError:
        raise StoreDamagedError(
            f"{path} is missing: was the folder moved, or its drive not mounted? Name all folders of the store"
        ) from None


def _allocate(files: StoreFiles, fd: int, path: str, nbytes: int) -> None:
    try:
        files.allocate(fd, nbytes)
    except OSError as error:
        if error.errno not in _FULL:
            raise disk_error("allocate", path, 0, nbytes, error) from error
        raise no_room(path, nbytes, files.stat(fd).st_blocks * 512) from error


def no_room(path: str, nbytes: int, taken_nbytes: int = 0) -> DoesNotFitError:
    """The error of a data file that its drive has no room for; `taken_nbytes` of it are there already."""
    folder = os.path.dirname(path)
    free = taken_nbytes
    with suppress(OSError):
        free += shutil.disk_usage(folder).free
    return DoesNotFitError(
        f"the block store needs {nbytes / 2**30:.2f} GiB for {path}, two slots for each block; the disk has "
        f"{free / 2**30:.2f} GiB: free space there, or name another folder, or several, with disk=… (--disk)",
        tier="disk",
        needed_nbytes=nbytes,
        available_nbytes=free,
    )
