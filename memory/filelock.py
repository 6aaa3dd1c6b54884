"""A lock file: while its flock is held, whoever wrote its pid inside is alive and owns what the file stands for."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from .errors import DiskError, ScratchBusyError

_ATTEMPTS = 100
"""How often to start again when the file was removed by its former owner between opening and locking it."""


class FileLock:
    """An exclusive lock on a file that is made for it and removed with it. The kernel drops it when the process dies.

    The lock belongs to the open file, not to the process: two `FileLock`s on one path exclude each other also inside
    one process.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def acquire(cls, path: Path, *, create: bool = True) -> FileLock | None:
        """Lock the file at `path` without waiting; None where `create` is false and there is no such file.

        Raises:
            ScratchBusyError: somebody holds it; the message names them.
            DiskError: the file cannot be made, is not a plain file of this user, or cannot be locked there.
        """
        for _ in range(_ATTEMPTS):
            fd = _open(path, create)
            if fd is None:
                return None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(fd, 256, 0).decode(errors="replace").strip()
                os.close(fd)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise ScratchBusyError(_busy(path, holder)) from error
                raise DiskError(
                    f"cannot lock {path}: {error.strerror}. Choose a folder on a local filesystem with --disk."
                ) from error
            if _still_there(path, fd):
                with suppress(OSError):  # on a full disk the lock holds all the same, without a name in it
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return cls(path, fd)
            os.close(fd)  # its former owner removed the file after we opened it: this is a lock on nothing
        raise ScratchBusyError(f"{path} is taken and given back again and again. Choose another folder with --disk.")

    def release(self) -> None:
        """Remove the file and let go of it. In this order: who opens it in between finds it locked, then gone."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close the file only. In a forked child this leaves the parent's lock as it is."""
        os.close(self._fd)


def _open(path: Path, create: bool) -> int | None:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    try:
        fd = os.open(path, flags, 0o600)
    except FileNotFoundError:
        if not create:
            return None
        raise DiskError(f"cannot make {path}: its folder does not exist. Choose another with --disk.") from None
    except OSError as error:
        raise DiskError(f"cannot make {path}: {error.strerror}. Choose another folder with --disk.") from error
    if os.fstat(fd).st_uid != os.geteuid():
        os.close(fd)
        raise DiskError(f"{path} belongs to another user. Choose another folder with --disk.")
    return fd


def _still_there(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _busy(path: Path, holder: str) -> str:
    who = f"another process ({holder})" if holder else "another process"
    return (
        f"{path.parent} is in use by {who}. Wait until it ends or stop it, or give this one a folder of its own "
        "with --disk."
    )
