"""Filesystems for the tests of the block store: one that fails on demand, and one that writes a log of what it did."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock.memory.store import SystemFiles

Hook = Callable[[str, str, int], None]


class HookedFiles(SystemFiles):
    """Calls `hook(operation, path, nbytes)` before every operation that changes something; it may raise."""

    def __init__(self, hook: Hook) -> None:
        self.hook = hook
        self.paths: dict[int, str] = {}

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        self.hook("create" if flags & os.O_CREAT else "open for writing" if flags & os.O_RDWR else "open", path, 0)
        fd = super().open(path, flags, mode)
        self.paths[fd] = path
        return fd

    def allocate(self, fd: int, nbytes: int) -> None:
        self.hook("allocate", self.paths[fd], nbytes)
        super().allocate(fd, nbytes)

    def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
        self.hook("pread", self.paths[fd], nbytes)
        return super().pread(fd, nbytes, offset)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self.hook("pwrite", self.paths[fd], len(data))
        return super().pwrite(fd, data, offset)

    def truncate(self, fd: int, nbytes: int) -> None:
        self.hook("truncate", self.paths[fd], nbytes)
        super().truncate(fd, nbytes)

    def punch(self, fd: int, offset: int, nbytes: int) -> None:
        self.hook("punch", self.paths[fd], nbytes)
        super().punch(fd, offset, nbytes)

    def fdatasync(self, fd: int) -> None:
        self.hook("fdatasync", self.paths[fd], 0)

    def fsync(self, fd: int) -> None:
        self.hook("fsync", self.paths[fd], 0)

    def close(self, fd: int) -> None:
        super().close(fd)  # the descriptor is gone whatever is said
        self.hook("close", self.paths[fd], 0)

    def rename(self, source: str, target: str) -> None:
        self.hook("rename", source, 0)
        super().rename(source, target)

    def link(self, source: str, target: str) -> None:
        self.hook("link", source, 0)
        super().link(source, target)

    def unlink(self, path: str) -> None:
        self.hook("unlink", path, 0)
        super().unlink(path)


class FailingFiles(HookedFiles):
    """Fails those operations that `fail` names, by "operation basename" (as "fsync manifest.new"), with an errno."""

    def __init__(self) -> None:
        super().__init__(self._check)
        self.fail: dict[str, int] = {}
        self.seen: list[str] = []

    def _check(self, operation: str, path: str, nbytes: int) -> None:
        what = f"{operation} {os.path.basename(path)}"
        if operation != "close":
            self.seen.append(what)
        if what in self.fail:
            raise OSError(self.fail[what], os.strerror(self.fail[what]))


@dataclass(kw_only=True, eq=False)
class Event:
    """Something that a power failure can undo until a sync of `target` that began after `end` has ended."""

    kind: str
    """write | create | rename | link | unlink"""
    target: object
    """The inode of a write; the folder of all else."""
    start: int
    end: int = 0
    """0 while it is under way."""
    inode: int = -1
    offset: int = 0
    data: bytes = b""
    name: str = ""
    other: str = ""
    """The new name of a rename or a link."""


@dataclass(kw_only=True, eq=False)
class Sync:
    """An fsync or fdatasync of an inode or a folder."""

    target: object
    start: int
    end: int = 0


@dataclass(kw_only=True)
class Log:
    """Everything that happened, on one clock that ticks with each beginning and end."""

    events: list[Event] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)
    done: list[tuple[int, int]] = field(default_factory=list)
    """When a commit's handle said done, and the commit's number."""
    now: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tick(self) -> int:
        with self.lock:
            self.now += 1
            return self.now


class LoggedFiles(SystemFiles):
    """Does everything for real, but for syncs, and logs it. `forget` names operations whose syncs are left out."""

    def __init__(self, log: Log, forget: frozenset[str] = frozenset()) -> None:
        self.log = log
        self.forget = forget
        self.during: Callable[[str], None] | None = None
        """Called in the middle of every sync."""
        self._inodes: dict[str, int] = {}
        self._targets: dict[int, object] = {}
        self._made = 0

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        start = self.log.tick()
        fd = super().open(path, flags, mode)
        if flags & os.O_DIRECTORY:
            self._targets[fd] = path
            return fd
        if flags & os.O_CREAT and path not in self._inodes:
            self._made += 1
            self._inodes[path] = self._made
            folder, name = os.path.split(path)
            self._log("create", folder, start, inode=self._made, name=name)
        else:
            assert not flags & os.O_TRUNC, "truncation is not modelled"
        self._targets[fd] = self._inodes[path]
        return fd

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        event = self._begin_write(fd, bytes(data), offset)
        done = super().pwrite(fd, data, offset)
        assert done == len(data)
        event.end = self.log.tick()
        return done

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """For a disk engine, whose files are opened by `open` here."""
        event = self._begin_write(fd, b"".join(buffers), offset)
        done = os.pwritev(fd, buffers, offset)
        event.end = self.log.tick()
        return done

    def fdatasync(self, fd: int) -> None:
        self._sync(fd, "fdatasync")

    def fsync(self, fd: int) -> None:
        self._sync(fd, "fsync folder" if isinstance(self._targets[fd], str) else "fsync")

    def rename(self, source: str, target: str) -> None:
        start = self.log.tick()
        super().rename(source, target)
        inode = self._inodes[target] = self._inodes.pop(source)
        folder, name = os.path.split(source)
        self._log("rename", folder, start, inode=inode, name=name, other=os.path.basename(target))

    def link(self, source: str, target: str) -> None:
        start = self.log.tick()
        super().link(source, target)
        inode = self._inodes[target] = self._inodes[source]
        folder, name = os.path.split(source)
        self._log("link", folder, start, inode=inode, name=name, other=os.path.basename(target))

    def unlink(self, path: str) -> None:
        start = self.log.tick()
        super().unlink(path)
        folder, name = os.path.split(path)
        self._log("unlink", folder, start, inode=self._inodes.pop(path), name=name)

    def truncate(self, fd: int, nbytes: int) -> None:
        """To the length that the file has already."""
        assert os.fstat(fd).st_size == nbytes

    def allocate(self, fd: int, nbytes: int) -> None:
        """The zeros of a new file are as lasting, or not, as any other write."""
        event = self._begin_write(fd, bytes(nbytes), 0)
        super().allocate(fd, nbytes)
        event.end = self.log.tick()

    def _log(self, kind: str, folder: str, start: int, *, inode: int, name: str, other: str = "") -> None:
        event = Event(kind=kind, target=folder, start=start, inode=inode, name=name, other=other)
        event.end = self.log.tick()
        self.log.events.append(event)

    def _begin_write(self, fd: int, data: bytes, offset: int) -> Event:
        inode = self._targets[fd]
        assert isinstance(inode, int)
        event = Event(kind="write", target=inode, start=self.log.tick(), inode=inode, offset=offset, data=data)
        self.log.events.append(event)
        return event

    def _sync(self, fd: int, operation: str) -> None:
        sync = Sync(target=self._targets[fd], start=self.log.tick())
        if self.during is not None:
            self.during(operation)
        sync.end = self.log.tick()
        if operation not in self.forget:
            self.log.syncs.append(sync)
