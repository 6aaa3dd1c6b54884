"""A folder that a verb makes: whole or not at all, and never in the place of another without being told so."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...memory.errors import DiskError, UsageError
from ...memory.files import disk_error


@contextmanager
def whole_folder(path: Path, *, force: bool, never: Sequence[str | None] = ()) -> Iterator[Path]:
    """Give an empty folder beside `path`; when the caller is done with it, it becomes `path`, durably.

    Whoever looks sees no folder, or all of it. On an exception nothing is left, and what was there stays. The caller
    sees to it that the files in it are durable.

    Args:
        path: Missing, or an empty folder. With `force` also a checkpoint, which is removed in the end.
        force: Whether a checkpoint may be replaced.
        never: Folders that are not replaced in any case: they are being read.

    Raises:
        UsageError: something else is there.
        DiskError: it cannot be made.
    """
    path = Path(os.path.abspath(path))
    _refuse(path, force, never)
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise DiskError(f"cannot make {partial}: {error.strerror}. Name a folder elsewhere.") from error
    try:
        yield partial
        _sync(partial)
        _refuse(path, force, never)  # writing may have taken long
        _publish(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after it was published, there is none of that name


def _publish(partial: Path, path: Path) -> None:
    old = None
    try:
        if path.is_dir() and any(path.iterdir()):
            old = path.with_name(partial.name.removesuffix(".partial") + ".old")
            path.rename(old)
        try:
            partial.rename(path)
        except OSError:
            if old is not None:
                old.rename(path)
            raise
    except OSError as error:
        raise disk_error("rename", os.fspath(partial), 0, 0, error) from error
    _sync(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _refuse(path: Path, force: bool, never: Sequence[str | None]) -> None:
    if any(each is not None and os.path.realpath(each) == os.path.realpath(path) for each in never):
        raise UsageError(f"{path} is what is to be read: name another folder")
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise UsageError(f"{path} is there already, and no folder: name another")
    held = list(path.iterdir())
    if not held:
        return
    if not force:
        raise UsageError(f"{path} is there already: replace it by --force, or name another folder")
    foreign = [each.name for each in held if each.is_dir()]
    if foreign or not any(each.suffix == ".safetensors" for each in held):
        what = f"it holds the folder {foreign[0]}" if foreign else "it holds no *.safetensors"
        raise UsageError(f"{path} is not a checkpoint that could be replaced, {what}: name another folder")


def _sync(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise disk_error("fsync", os.fspath(folder), 0, 0, error) from error
