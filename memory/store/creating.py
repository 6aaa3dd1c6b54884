"""Making a store: folders, labels, data files with all their room, and a first commit that holds nothing."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from ..errors import DiskError, StoreDamagedError, StoreError
from ..filelock import FileLock
from .datafiles import DataFiles, no_room
from .files import StoreFiles, SystemFiles
from .folder import (
    DATA,
    LABEL,
    LOCK,
    MANIFEST,
    NEW,
    OURS,
    PREVIOUS,
    Found,
    publish_new,
    read_label,
    read_manifest,
    remove,
    sync_folder,
    write_new,
)
from .manifest import Label, StoreFacts, pack_label, pack_manifest
from .opening import Folder, Parts, as_paths, lock_folders
from .slotmap import BlockSpec, SlotMap, check_blocks, spread
from .slots import Cut


def create_parts(
    files: StoreFiles,
    folders: Folder | Sequence[Folder],
    blocks: Sequence[BlockSpec],
    *,
    identity: str,
    metadata: bytes,
) -> Parts:
    """Make a store and keep it open. See `BlockStore.create`, whose errors these are."""
    check_blocks(blocks)
    paths = as_paths(folders)
    slotmap = SlotMap(
        blocks=tuple(blocks),
        homes=spread(blocks, len(paths)),
        paths=tuple(str(path / DATA) for path in paths),
    )
    facts = StoreFacts(
        store=secrets.token_hex(16), identity=identity, folders=tuple(str(path) for path in paths), slotmap=slotmap
    )
    with ExitStack() as undo:
        for path in paths:
            _make_folder(files, path, undo)
        locks: list[FileLock] = []
        lock_folders(paths, locks, undo)
        _refuse_what_is_there(files, paths)
        for path in paths:
            undo.callback(_remove_ours, files, path)
            _remove_ours(files, path)  # what an unfinished creation left: no commit was ever in it
        _check_room(slotmap)
        for drive, path in enumerate(paths):
            label = Label(store=facts.store, drive=drive, home=os.fsencode(facts.folders[0]))
            write_new(files, str(path / LABEL), pack_label(label))
            publish_new(files, str(path / LABEL))
        data = DataFiles.make(files, slotmap)
        undo.callback(data.close)
        for path in paths:
            sync_folder(files, str(path))
        found = _first_commit(files, facts, metadata)
        undo.pop_all()
    return Parts(facts=facts, found=found, data=data, locks=tuple(locks))


def check_vacant(folders: Folder | Sequence[Folder], files: StoreFiles | None = None) -> None:
    """See that `BlockStore.create` would find nothing there that must not be lost, and nobody at work. Changes nothing.

    Raises:
        StoreError: a folder holds something that would be lost.
        StoreBusyError: another process uses one.
        DiskError: one cannot be looked at.
    """
    present = [path for path in as_paths(folders) if path.is_dir()]
    if not present:
        return
    check_unused(present)
    _refuse_what_is_there(files or SystemFiles(), present)


def check_unused(folders: Folder | Sequence[Folder]) -> None:
    """See that nobody has these folders locked now.

    Raises:
        StoreBusyError: somebody has.
        DiskError: one cannot be locked.
    """
    with ExitStack() as undo:
        lock_folders(as_paths(folders), [], undo)


def _first_commit(files: StoreFiles, facts: StoreFacts, metadata: bytes) -> Found:
    cut = Cut(number=0, metadata=metadata, copies=(None,) * len(facts.slotmap.blocks), unlanded=set())
    manifest = facts.manifest(cut, 0)
    packed = pack_manifest(manifest)
    path = os.path.join(facts.folders[0], MANIFEST)
    write_new(files, path, packed)
    publish_new(files, path)
    return Found(manifest=manifest, nbytes=len(packed), doubt="")


def _make_folder(files: StoreFiles, path: Path, undo: ExitStack) -> None:
    """Make a folder that only this user may enter, and its parents, and see that they are still there tomorrow."""
    if path.is_dir():
        return
    if path.exists():
        raise DiskError(f"{path} is not a folder. Choose another with --disk.")
    missing = [path, *(parent for parent in path.parents if not parent.exists())]
    for folder in reversed(missing):
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise DiskError(f"cannot make {folder}: {error.strerror}. Choose another folder with --disk.") from error
        undo.callback(_remove_if_empty, folder)
        sync_folder(files, str(folder.parent))


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _remove_ours(files: StoreFiles, folder: Path) -> None:
    """Take a store away that never had a commit of use. The label goes last: until then the folder is known as ours."""
    for name in (MANIFEST, PREVIOUS, MANIFEST + NEW, DATA, LABEL + NEW, LABEL):
        remove(files, str(folder / name))


def _refuse_what_is_there(files: StoreFiles, paths: Sequence[Path]) -> None:
    """Nothing is overwritten but a store that holds no commit beyond the empty one."""
    labels: dict[Path, Label] = {}
    for path in paths:
        names = set(os.listdir(path)) - {LOCK}
        foreign = sorted(names - OURS)
        if foreign:
            listed = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
            raise StoreError(
                f"{path} is not empty and not a block store: it holds {listed}. Nothing there is touched; choose a new "
                "folder or an empty one with disk=… (--disk)"
            )
        if LABEL in names:
            labels[path] = read_label(files, path)
        elif names - {LABEL + NEW}:
            raise StoreError(
                f"{path} holds {', '.join(sorted(names))} but no {LABEL} that would prove it a block store. Nothing "
                "there is touched; choose another folder, or remove the files by hand if nothing in them is needed"
            )
    homes = {label.store: path for path, label in labels.items() if label.drive == 0}
    for path, label in labels.items():
        if label.store not in homes:
            raise StoreError(
                f"{path} is part {label.drive} of a block store whose home folder was {os.fsdecode(label.home)}. "
                "Nothing there is touched; choose another folder, or remove both by hand if nothing in them is needed"
            )
    for home in homes.values():
        _refuse_commits(files, home)


def _refuse_commits(files: StoreFiles, home: Path) -> None:
    if not any(os.path.lexists(home / name) for name in (MANIFEST, PREVIOUS)):
        return  # its creation was cut off
    found = read_manifest(files, home)
    number = found.manifest.commit
    if found.doubt:
        raise StoreDamagedError(
            f"{found.doubt}, and {home} may hold commits all the same. Nothing there is touched; bring that file back "
            "from a copy, choose another folder, or remove this one by hand if it is not needed"
        )
    if number > 0:
        raise StoreError(
            f"{home} holds a block store at commit {number}. Nothing there is touched; go on with it (resume), choose "
            "another folder, or remove it by hand if it is not needed"
        )


def _check_room(slotmap: SlotMap) -> None:
    """Say at once what does not fit, instead of filling the drive first. Folders may share a drive."""
    wanted: dict[int, int] = {}
    for path, nbytes in zip(slotmap.paths, slotmap.drive_nbytes(), strict=True):
        folder = os.path.dirname(path)
        with suppress(OSError):
            device, space = os.stat(folder).st_dev, os.statvfs(folder)
            wanted[device] = wanted.get(device, 0) + nbytes
            if wanted[device] > space.f_bavail * space.f_frsize:
                raise no_room(path, wanted[device])
