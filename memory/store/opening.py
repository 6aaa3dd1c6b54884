"""Finding the folders of a store, locking them, and deciding which commit they are at."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..errors import (
    DiskError,
    ScratchBusyError,
    StoreBusyError,
    StoreDamagedError,
    StoreError,
    StoreIdentityError,
    UsageError,
)
from ..filelock import FileLock
from .datafiles import DataFiles
from .files import StoreFiles
from .folder import (
    DATA,
    LABEL,
    LOCK,
    MANIFEST,
    NEW,
    Found,
    publish_new,
    read_label,
    read_manifest,
    remove,
    write_new,
)
from .manifest import StoreFacts, facts_of, pack_manifest
from .reading import check_blocks_read

logger = logging.getLogger(__name__)

Folder = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """An open store, in parts."""

    facts: StoreFacts
    found: Found
    data: DataFiles
    locks: tuple[FileLock, ...]
    removed: tuple[str, ...] = ()
    """Files that a killed process had left."""


def as_paths(folders: Folder | Sequence[Folder]) -> tuple[Path, ...]:
    """One folder or several, as absolute paths.

    Raises:
        UsageError: there is none, or one twice.
    """
    given = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
    paths = tuple(Path(folder).resolve() for folder in given)
    if not paths:
        raise UsageError("a block store needs a folder; none was given")
    if len(set(paths)) < len(paths):
        raise UsageError(f"a folder is named twice: {', '.join(str(path) for path in paths)}")
    return paths


def open_parts(
    files: StoreFiles,
    folders: Folder | Sequence[Folder],
    *,
    identity: str | None,
    readonly: bool,
    allocate: bool = True,
) -> Parts:
    """Open a store that exists. See `BlockStore.open`, whose errors these are."""
    home, named = _locate(files, as_paths(folders))
    with ExitStack() as undo:
        locks: list[FileLock] = []
        if not readonly:
            lock_folders([home], locks, undo)
        found, facts = _read(files, home, named)
        if identity is not None and facts.identity != identity:
            raise StoreIdentityError(
                f"{home} holds a run of {facts.identity!r}, and this is {identity!r}: name the folder of this run, or "
                "go on with the model and the settings that the run was started with"
            )
        if not readonly:
            lock_folders([Path(folder) for folder in facts.folders[1:]], locks, undo)
            # Again, since who held the lock before may have committed after the first look.
            found, facts = _read(files, home, named)
        data = DataFiles.open(files, facts.slotmap, readonly=readonly, allocate=allocate)
        undo.callback(data.close)
        if found.doubt:
            _settle_doubt(files, home, found, facts, readonly)
        removed = () if readonly else _remove_left_over(files, facts)
        undo.pop_all()
    return Parts(facts=facts, found=found, data=data, locks=tuple(locks), removed=removed)


def look(files: StoreFiles, folders: Folder | Sequence[Folder]) -> tuple[Found, StoreFacts]:
    """What the newest manifest says, without a lock: a store that is being written may be looked at."""
    home, named = _locate(files, as_paths(folders))
    return _read(files, home, named)


def lock_folders(folders: Sequence[Path], locks: list[FileLock], undo: ExitStack) -> None:
    """Lock folders for this process, adding to `locks` what `undo` lets go of.

    Raises:
        StoreBusyError: somebody holds one; the message names them.
        DiskError: a lock file cannot be made.
    """
    for folder in folders:
        try:
            lock = FileLock.acquire(folder / LOCK)
        except ScratchBusyError as error:
            raise StoreBusyError(str(error)) from error
        assert lock is not None, folder
        undo.callback(lock.release)
        locks.append(lock)


def _remove_left_over(files: StoreFiles, facts: StoreFacts) -> tuple[str, ...]:
    paths = [os.path.join(folder, name) for folder in facts.folders for name in (LABEL + NEW, MANIFEST + NEW)]
    return tuple(path for path in paths if remove(files, path))


def _locate(files: StoreFiles, paths: Sequence[Path]) -> tuple[Path, dict[int, Path]]:
    """The home folder, and the folder of each drive that was named."""
    labels = [(path, read_label(files, path)) for path in paths]
    named: dict[int, Path] = {}
    for path, label in labels:
        if label.store != labels[0][1].store:
            raise StoreError(f"{labels[0][0]} and {path} belong to different stores: name the folders of one")
        if label.drive in named:
            raise StoreError(f"{named[label.drive]} and {path} are the same part of a store: one is a copy; name one")
        named[label.drive] = path
    if 0 not in named:
        path, label = labels[0]
        raise StoreError(
            f"{path} is part {label.drive} of a store; its home folder, which has the manifest, was "
            f"{os.fsdecode(label.home)}: name that folder first"
        )
    return named[0], named


def _read(files: StoreFiles, home: Path, named: dict[int, Path]) -> tuple[Found, StoreFacts]:
    found = read_manifest(files, home)
    manifest = found.manifest
    folders = [named.get(drive, Path(os.fsdecode(record.folder))) for drive, record in enumerate(manifest.drives)]
    folders[0] = home
    surplus = [str(path) for drive, path in named.items() if drive >= len(folders)]
    if surplus:
        raise StoreError(
            f"{', '.join(surplus)}: the store in {home} has {len(folders)} folders, and not this: leave it out"
        )
    for drive, folder in enumerate(folders):
        try:
            label = read_label(files, folder)
        except (StoreError, DiskError) as error:
            raise type(error)(f"{error} (it is part {drive} of the store in {home}: name all its folders)") from error
        if (label.store, label.drive) != (manifest.store, drive):
            raise StoreDamagedError(
                f"{folder} is not part {drive} of the store in {home}: its label or the manifest comes from another "
                "store; bring the right one back from a copy"
            )
    return found, facts_of(manifest, [str(folder) for folder in folders], [str(folder / DATA) for folder in folders])


def _settle_doubt(files: StoreFiles, home: Path, found: Found, facts: StoreFacts, readonly: bool) -> None:
    """The manifest before the last is worth something only if none of its slots was written again: read them all."""
    number = found.manifest.commit
    if number == 0:
        raise StoreDamagedError(
            f"{found.doubt}. The commit before it is the empty one, which cannot take its place: bring "
            f"{home / MANIFEST} back from a copy"
        )
    logger.warning("%s; reading all blocks of commit %d, the one before, to see if they are whole", found.doubt, number)
    bad = check_blocks_read(found.manifest, facts.slotmap)
    if bad:
        raise StoreDamagedError(
            f"{found.doubt}. Commit {number}, the one before, cannot take its place: {len(bad)} of its blocks were "
            f"written again since, {bad[0].name!r} among them. Bring {home / MANIFEST} back from a copy"
        )
    logger.warning("commit %d is whole and is used; what was committed after it is lost", number)
    if not readonly:
        path = str(home / MANIFEST)
        write_new(files, path, pack_manifest(found.manifest))
        publish_new(files, path)
