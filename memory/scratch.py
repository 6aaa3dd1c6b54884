"""Scratch folders: where a model keeps blocks on disk while it runs.

A folder is proved to be in use by a lock file that its process holds (see `filelock`), so that folders left behind by
a killed process can be told from living ones. Nothing is ever removed that this process did not make, with one
exception: leftovers of killed processes in folders that only this module writes to, which are the default root and
those named to `remove_leftovers`.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import secrets
import shutil
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from .capacity import disk_capacity
from .errors import DiskError, ScratchBusyError, UsageError
from .filelock import FileLock

logger = logging.getLogger(__name__)

_LOCK_NAME: Final = ".penstock-lock"
_PREFIX: Final = "penstock-"
_LOCK_SUFFIX: Final = ".lock"


def default_root(proc_root: Path = Path("/proc")) -> Path:
    """The user's cache folder for penstock: $XDG_CACHE_HOME/penstock, else ~/.cache/penstock. Not made here.

    Raises:
        UsageError: there is no home folder, or the cache folder lies in memory (tmpfs).
    """
    setting = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # A relative path there is to be ignored, says the XDG base directory specification.
        cache = Path(setting) if os.path.isabs(setting) else Path.home() / ".cache"
    except RuntimeError as error:
        raise UsageError("there is no home folder to keep scratch files in: set XDG_CACHE_HOME or --disk") from error
    root = cache / "penstock"
    disk = disk_capacity(root, proc_root)
    if disk.in_memory:
        raise UsageError(
            f"the cache folder {root} is on {disk.filesystem}, which is memory, not disk: set XDG_CACHE_HOME or --disk "
            "to a folder on a disk"
        )
    return root


class Scratch:
    """One use of a scratch folder, until `close()`.

    `path` is a new and empty folder, mode 0700, unless the caller asked for a folder as it is.
    """

    def __init__(self, folders: ScratchFolders, path: Path, holds: _Holds) -> None:
        self._folders = folders
        self._holds = holds
        self.path = path

    def close(self) -> None:
        """Remove what this process made and let go of the folder. More than once does no harm; a forked child does
        nothing.

        Raises:
            DiskError: files could not be removed. The folder is let go of all the same.
        """
        self._folders._close(self)

    def __enter__(self) -> Scratch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Holds:
    """What one use holds: its locks, and what is to be removed at its end."""

    lock: FileLock | None
    """The lock of a folder made for this use; None for a use of a named folder, which is locked once per process."""
    shared: Path | None
    """The named folder that the use lies in."""
    made: Path | None
    """The folder to remove; None where it was there before."""


@dataclass(kw_only=True, slots=True)
class _Shared:
    """A named folder that this process has locked, and how many of its uses are alive."""

    lock: FileLock
    made: bool
    uses: int = 0


class ScratchFolders:
    """The scratch folders of this process. Thread-safe. A forked child starts with none, and removes none.

    One object per process, because a file lock excludes also its own process: models that share a named folder must
    share its lock.
    """

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=functools.partial(_forget_in_child, weakref.ref(self)))

    def open(self, folder: str | os.PathLike[str] | None = None, *, unique: bool = True) -> Scratch:
        """A folder to write to.

        Without `folder`: a new one under `default_root()`; leftovers of killed processes there are removed first.
        With it: that folder, made if missing, is locked for this process, and the result is a new folder inside. With
        `unique=False` the result is the folder itself, whose files are the caller's: they stay, and so does the folder
        unless this process made it and it is empty at the end.

        Raises:
            ScratchBusyError: another process uses `folder`; the message names it.
            UsageError: there is no default (see `default_root`).
            DiskError: the folder cannot be made or locked.
        """
        with self._lock:
            if folder is None:
                root = default_root() / "scratch"
                _make_parents(root)
                _remove_leftovers(root)
                path, lock = _make_unique(root)
                use = Scratch(self, path, _Holds(lock=lock, shared=None, made=path))
            else:
                use = self._open_named(Path(folder), unique)
            self._uses.add(use)
            return use

    def remove_leftovers(self, folder: str | os.PathLike[str]) -> None:
        """Remove what killed processes left in a folder that is for scratch and nothing else.

        Does nothing where there is no such folder, or where this process uses it.

        Raises:
            ScratchBusyError: another process uses it; the message names it.
            DiskError: it cannot be locked.
        """
        path = Path(folder).resolve()
        with self._lock:
            if path in self._shared or not path.is_dir():
                return
            lock = FileLock.acquire(path / _LOCK_NAME)
            assert lock is not None
            try:
                for left in sorted(path.glob(f"{_PREFIX}*/")):
                    if not left.is_symlink():
                        _remove_leftover(left)
            finally:
                lock.release()

    def close_all(self) -> None:
        """Close every use that is still open; what cannot be removed is logged."""
        for use in list(self._uses):
            try:
                use.close()
            except DiskError as error:
                logger.warning("%s", error)

    def _open_named(self, folder: Path, unique: bool) -> Scratch:
        made = _make_folder(folder)
        folder = folder.resolve()
        if folder not in self._shared:
            try:
                lock = FileLock.acquire(folder / _LOCK_NAME)
            except (ScratchBusyError, DiskError):
                if made:
                    _remove_if_empty(folder)
                raise
            assert lock is not None
            self._shared[folder] = _Shared(lock=lock, made=made)
            _report_leftovers(folder)
        shared = self._shared[folder]
        try:
            path = _make_private(folder / f"{_PREFIX}{secrets.token_hex(8)}") if unique else folder
        except DiskError:
            if shared.uses == 0:
                self._let_go(folder)
            raise
        shared.uses += 1
        return Scratch(self, path, _Holds(lock=None, shared=folder, made=path if unique else None))

    def _close(self, use: Scratch) -> None:
        with self._lock:
            if use not in self._uses:
                return
            self._uses.discard(use)
            holds = use._holds
            failures: list[OSError] = []
            if holds.made is not None:
                _remove_tree(holds.made, failures)
            if holds.lock is not None:
                holds.lock.release()
            if holds.shared is not None:
                shared = self._shared[holds.shared]
                shared.uses -= 1
                if shared.uses == 0:
                    self._let_go(holds.shared)
        if failures:
            raise DiskError(f"cannot remove scratch files: {failures[0]}. Remove {use.path} by hand.") from failures[0]

    def _let_go(self, folder: Path) -> None:
        shared = self._shared.pop(folder)
        shared.lock.release()
        if shared.made:
            _remove_if_empty(folder)

    def _forget(self) -> None:
        # The lock too: at the fork another thread of the parent may have held it. Reentrant for finalizers.
        self._lock = threading.RLock()
        self._uses: set[Scratch] = set()
        self._shared: dict[Path, _Shared] = {}

    def _forget_in_child(self) -> None:
        # A child that keeps the files open would keep the folders locked after its parent's death.
        for shared in self._shared.values():
            shared.lock.close()
        for use in self._uses:
            if use._holds.lock is not None:
                use._holds.lock.close()
        self._forget()


@functools.cache
def process_scratch() -> ScratchFolders:
    """The scratch folders that all models of this process share; removed when the interpreter exits."""
    folders = ScratchFolders()
    atexit.register(folders.close_all)
    return folders


def _forget_in_child(folders: weakref.ref[ScratchFolders]) -> None:
    alive = folders()
    if alive is not None:
        alive._forget_in_child()


def _make_unique(root: Path) -> tuple[Path, FileLock]:
    """A new folder under `root` and the lock beside it. The lock comes first: a folder never stands there without."""
    while True:
        path = root / f"{_PREFIX}{secrets.token_hex(8)}"
        try:
            lock = FileLock.acquire(path.with_name(path.name + _LOCK_SUFFIX))
        except ScratchBusyError:
            continue  # another process took the new file for a leftover, and is about to remove it
        assert lock is not None
        try:
            return _make_private(path), lock
        except DiskError:
            lock.release()
            raise


def _remove_leftovers(root: Path) -> None:
    """Remove folders under the default root whose process is gone: whose lock file nobody holds."""
    for lock_path in sorted(root.glob(f"{_PREFIX}*{_LOCK_SUFFIX}")):
        try:
            lock = FileLock.acquire(lock_path, create=False)
        except (ScratchBusyError, DiskError):
            continue  # alive, or not ours
        if lock is None:
            continue
        path = lock_path.with_name(lock_path.name.removesuffix(_LOCK_SUFFIX))
        if not path.is_dir() or path.is_symlink() or _remove_leftover(path):
            lock.release()
        else:
            lock.close()  # keeps the file, so that the next start tries again


def _remove_leftover(path: Path) -> bool:
    """Remove a folder whose process is gone; whether it is gone, too."""
    failures: list[OSError] = []
    _remove_tree(path, failures)
    if failures:
        logger.warning("cannot remove %s, left by a process that was killed: %s", path, failures[0])
    else:
        logger.info("removed %s, left by a process that was killed", path)
    return not failures


def _report_leftovers(folder: Path) -> None:
    for path in sorted(folder.glob(f"{_PREFIX}*/")):
        logger.warning("%s was left by a process that was killed; remove it by hand if nothing in it is needed", path)


def _make_parents(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot make {folder}: {error.strerror}. Choose another folder with --disk.") from error


def _make_folder(folder: Path) -> bool:
    """Make a folder that only this user may enter, and its parents. False where it was there already."""
    _make_parents(folder.parent)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError as error:
        if folder.is_dir():
            return False
        raise DiskError(f"{folder} is not a folder. Choose another with --disk.") from error
    except OSError as error:
        raise DiskError(f"cannot make {folder}: {error.strerror}. Choose another folder with --disk.") from error
    return True


def _make_private(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700)
    except OSError as error:
        raise DiskError(f"cannot make {path}: {error.strerror}. Choose another folder with --disk.") from error
    return path


def _remove_tree(path: Path, failures: list[OSError]) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        failures.append(error)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        logger.debug("%s is not empty and stays", folder)
