"""What the store asks of a filesystem: one small protocol, so that tests can refuse, cut short and log each call."""

from __future__ import annotations

import ctypes
import os
from typing import Final, Protocol

from ..errors import DiskError
from ..files import disk_error

_libc: Final = ctypes.CDLL(None, use_errno=True)
_PUNCH_HOLE_KEEP_SIZE: Final = 0x02 | 0x01


class StoreFiles(Protocol):
    """The file operations of a store. All raise OSError. Paths are absolute."""

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """A new file descriptor."""

    def close(self, fd: int) -> None:
        """Close a descriptor."""

    def stat(self, fd: int) -> os.stat_result:
        """Size, type and allocated blocks of an open file."""

    def allocate(self, fd: int, nbytes: int) -> None:
        """Take `nbytes` of the drive from the start of the file, and make it at least that long."""

    def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
        """At most `nbytes`; fewer at the end of the file."""

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """How many bytes were written, which may be fewer than given."""

    def truncate(self, fd: int, nbytes: int) -> None:
        """Cut the file, or lengthen it by a hole."""

    def punch(self, fd: int, offset: int, nbytes: int) -> None:
        """Give a range back to the drive; it reads as zeros from then on."""

    def fdatasync(self, fd: int) -> None:
        """Bring the file's bytes to the medium."""

    def fsync(self, fd: int) -> None:
        """Bring a file, or the names in a folder, to the medium."""

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, atomically replacing what had it."""

    def link(self, source: str, target: str) -> None:
        """Give a file a second name, which must be free."""

    def unlink(self, path: str) -> None:
        """Take a name away."""

    def set_time(self, path: str, seconds: int) -> None:
        """Set the time at which a file was changed, to a number that need not be a time."""

    def status(self, path: str) -> os.stat_result:
        """Size, type and time of what has a name, without opening it."""

    def names(self, folder: str) -> list[str]:
        """What is in a folder."""


class SystemFiles:
    """The operating system's own."""

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """See `StoreFiles`; symbolic links are refused and no child process inherits the descriptor."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def close(self, fd: int) -> None:
        """See `StoreFiles`."""
        os.close(fd)

    def stat(self, fd: int) -> os.stat_result:
        """See `StoreFiles`."""
        return os.fstat(fd)

    def allocate(self, fd: int, nbytes: int) -> None:
        """See `StoreFiles`."""
        os.posix_fallocate(fd, 0, nbytes)

    def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
        """See `StoreFiles`."""
        return os.pread(fd, nbytes, offset)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """See `StoreFiles`."""
        return os.pwrite(fd, data, offset)

    def truncate(self, fd: int, nbytes: int) -> None:
        """See `StoreFiles`."""
        os.ftruncate(fd, nbytes)

    def punch(self, fd: int, offset: int, nbytes: int) -> None:
        """See `StoreFiles`."""
        # Python has no call for it; offsets are 64 bits wide whatever the C library's default is.
        failed = _libc.fallocate64(fd, _PUNCH_HOLE_KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(nbytes))
        if failed:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def fdatasync(self, fd: int) -> None:
        """See `StoreFiles`."""
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        """See `StoreFiles`."""
        os.fsync(fd)

    def rename(self, source: str, target: str) -> None:
        """See `StoreFiles`."""
        os.rename(source, target)

    def link(self, source: str, target: str) -> None:
        """See `StoreFiles`."""
        os.link(source, target)

    def unlink(self, path: str) -> None:
        """See `StoreFiles`."""
        os.unlink(path)

    def set_time(self, path: str, seconds: int) -> None:
        """See `StoreFiles`."""
        os.utime(path, (seconds, seconds), follow_symlinks=False)

    def status(self, path: str) -> os.stat_result:
        """See `StoreFiles`."""
        return os.lstat(path)

    def names(self, folder: str) -> list[str]:
        """See `StoreFiles`."""
        return os.listdir(folder)


def write_all(files: StoreFiles, fd: int, path: str, data: memoryview, offset: int) -> None:
    """Write all of `data`, however many calls that takes.

    Raises:
        DiskError: the drive failed or is full.
    """
    done = 0
    while done < len(data):
        try:
            count = files.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            raise disk_error("write", path, offset + done, len(data) - done, error) from error
        if count == 0:
            raise DiskError(
                f"cannot write {len(data) - done} bytes at offset {offset + done} of {path}: the system takes none of "
                "them and gives no reason; check the drive, then run again"
            )
        done += count


def read_all(files: StoreFiles, fd: int, path: str, nbytes: int, offset: int) -> bytes:
    """Exactly `nbytes` from `offset`.

    Raises:
        DiskError: the drive failed, or the file ends before.
    """
    pieces: list[bytes] = []
    got = 0
    while got < nbytes:
        try:
            piece = files.pread(fd, nbytes - got, offset + got)
        except OSError as error:
            raise disk_error("read", path, offset + got, nbytes - got, error) from error
        if not piece:
            raise DiskError(
                f"cannot read {nbytes - got} bytes at offset {offset + got} of {path}: the file ends there; "
                "it was truncated after the store was made: bring it back from a copy"
            )
        pieces.append(piece)
        got += len(piece)
    return b"".join(pieces)
