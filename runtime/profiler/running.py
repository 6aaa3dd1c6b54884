"""Which recordings run now: one small file per process in the user's cache, so that a PID leads to a profile."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import psutil

logger = logging.getLogger(__name__)

_SLACK_S: Final = 1.0
"""How far two readings of one process's start may differ."""


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """One recording."""

    pid: int
    created_unix_s: float
    """When the process started: a later process may get the same PID."""
    path: str
    """The profile, absolute."""
    argv: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Announcement:
    """The entry of a recording of this process, until `close()`."""

    entry: Running
    file: Path | None
    """None where the cache could not be written."""

    def close(self) -> None:
        """Remove the entry, unless a later recording of this process has taken its place. More than once does no harm;
        a forked child does nothing."""
        if self.file is None or os.getpid() != self.entry.pid:
            return
        if _read(self.file) == self.entry:
            self.file.unlink(missing_ok=True)


def folder() -> Path | None:
    """Where the entries are: penstock/running in the user's cache; None where the user has no home."""
    setting = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # A relative path there is to be ignored, says the XDG base directory specification.
        return (Path(setting) if os.path.isabs(setting) else Path.home() / ".cache") / "penstock" / "running"
    except RuntimeError:
        return None


def announce(profile: str | os.PathLike[str]) -> Announcement:
    """Say that this process records to `profile`. A cache that cannot be written is no reason to fail a run: it is
    logged, and only `penstock prof live PID` does without."""
    pid = os.getpid()
    entry = Running(
        pid=pid,
        created_unix_s=_created(pid) or 0.0,
        path=os.path.abspath(profile),
        argv=tuple(sys.argv),
    )
    root = folder()
    if root is None:
        return Announcement(entry=entry, file=None)
    file = root / f"{pid}.json"
    temporary = root / f"{pid}.new"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.encode(entry))
        temporary.replace(file)
    except OSError as error:
        logger.info("the recording is not announced: %s", error)
        return Announcement(entry=entry, file=None)
    return Announcement(entry=entry, file=file)


def running() -> tuple[Running, ...]:
    """The recordings whose process is alive, by PID. Entries of dead processes are removed."""
    root = folder()
    found = []
    for file in sorted(root.glob("*.json")) if root is not None else ():
        entry = _read(file)
        if entry is not None and _alive(entry):
            found.append(entry)
        elif entry is None or _read(file) == entry:  # not replaced in the meantime
            _remove(file)
    return tuple(sorted(found, key=lambda entry: entry.pid))


def find(pid: int) -> Running | None:
    """The recording of a process; None where it records nothing."""
    return next((entry for entry in running() if entry.pid == pid), None)


def _read(file: Path) -> Running | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Running)
    except (OSError, msgspec.MsgspecError):
        return None


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        logger.debug("%s stays: %s", file, error)


def _alive(entry: Running) -> bool:
    created = _created(entry.pid)
    return created is not None and abs(created - entry.created_unix_s) <= _SLACK_S


def _created(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except (psutil.Error, ValueError):
        return None
