"""Open files of the disk engine: O_DIRECT where the filesystem grants it, else buffered with a clean page cache."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import DiskError

logger = logging.getLogger(__name__)

_REMEDIES = {
    errno.EIO: "the drive reported an error: look at `dmesg` and the drive's health, then copy the file elsewhere",
    errno.ENOSPC: "the disk is full: free space there, or name another folder with disk=… (--disk)",
    errno.EDQUOT: "the disk quota is used up: free space there, or name another folder with disk=… (--disk)",
    errno.ENOENT: "the file is gone: was the checkpoint moved or deleted while it was in use?",
    errno.EACCES: "permission was refused: check the owner and mode of the file",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
    errno.EROFS: "the filesystem is read-only: name another folder with disk=… (--disk)",
}


def disk_error(action: str, path: str, offset: int, nbytes: int, error: OSError) -> DiskError:
    """The one-line error of a failed request: what, where, why, and what to do."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    remedy = _REMEDIES.get(error.errno or 0, "check the drive and the file, then run again")
    return DiskError(f"cannot {action} {nbytes} bytes at offset {offset} of {path}: {reason}; {remedy}")


_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def is_shortage(error: BaseException | None) -> bool:
    """Whether a request failed for want of descriptors or memory: it says nothing of the file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None and error.errno in _SHORTAGES


@dataclass(kw_only=True, slots=True, eq=False)
class OpenFile:
    """One open file. `direct` turns False for good when the filesystem refuses an O_DIRECT request."""

    path: str
    fd: int
    device: int
    """st_dev: requests for one drive queue together."""
    direct: bool
    writable: bool

    def drop_cache(self, offset: int, nbytes: int) -> None:
        """Leave no page of a buffered request behind in the page cache."""
        if not self.direct:
            if self.writable:  # dirty pages cannot be dropped
                os.fdatasync(self.fd)
            os.posix_fadvise(self.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def refuse_direct(self) -> None:
        """Go on buffered after the filesystem refused an O_DIRECT request.

        Raises:
            DiskError: the file cannot be opened again.
        """
        if self.direct:
            flags = os.O_RDWR if self.writable else os.O_RDONLY
            try:
                replacement = os.open(self.path, flags | os.O_CLOEXEC)
            except OSError as error:
                raise disk_error("open", self.path, 0, 0, error) from error
            os.dup2(replacement, self.fd, inheritable=False)
            os.close(replacement)
            _without_readahead(self.fd)
            self.direct = False


def _without_readahead(fd: int) -> None:
    """Have the kernel read what is asked for and no more: nobody would drop the pages that it reads ahead."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


@dataclass(kw_only=True, eq=False)
class FileTable:
    """Files by path, opened on first use and kept open until `close`."""

    open_file: Callable[[str, int, int], int] = os.open
    """Called as `open_file(path, flags, mode)`; a seam for fault injection."""
    _files: dict[tuple[str, bool], OpenFile] = field(default_factory=dict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _told: bool = field(default=False, init=False)

    def get(self, path: str, *, writable: bool = False) -> OpenFile:
        """The open file for a path.

        Raises:
            DiskError: it cannot be opened.
        """
        with self._lock:
            known = self._files.get((path, writable))
            if known is None:
                known = self._files[path, writable] = self._open(path, writable)
            return known

    def _open(self, path: str, writable: bool) -> OpenFile:
        flags = os.O_CLOEXEC | (os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY)
        try:
            try:
                fd, direct = self.open_file(path, flags | os.O_DIRECT, 0o600), True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                fd, direct = self.open_file(path, flags, 0o600), False
                _without_readahead(fd)
                self.tell_buffered(path)
            return OpenFile(path=path, fd=fd, device=os.fstat(fd).st_dev, direct=direct, writable=writable)
        except OSError as error:
            raise disk_error("open", path, 0, 0, error) from error

    def tell_buffered(self, path: str) -> None:
        """Say once that O_DIRECT is refused here."""
        if not self._told:
            self._told = True
            logger.warning(
                "%s: the filesystem refuses O_DIRECT; reading through the page cache and dropping each page after "
                "use, which costs a copy. Put the files on ext4, xfs or btrfs to avoid it.",
                path,
            )

    def forget(self, path: str) -> None:
        """Close a file that is read, for the one who knows that nobody reads it now; it may be opened again."""
        with self._lock:
            file = self._files.pop((path, False), None)
        if file is not None:
            os.close(file.fd)

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            files, self._files = self._files, {}
        for file in files.values():
            os.close(file.fd)
