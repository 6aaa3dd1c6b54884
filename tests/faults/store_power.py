"""What a disk may hold after the power failed: built from a log of writes and syncs."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from store_files import Event, Log

SECTOR = 512
PAGE = 4096


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What became of an event that no sync covered: for a write, which pieces of it landed."""

    landed: frozenset[int]
    """Numbers of pieces; anything but a write has one."""
    piece_nbytes: int = PAGE


@dataclass(frozen=True, kw_only=True)
class Crash:
    """A moment of a log."""

    at: int
    issued: list[Event]
    """In order of their beginning."""
    open_events: list[Event]
    """Those of the issued that no sync covered."""
    done: int
    """The newest commit whose handle had said done."""


def crash(log: Log, at: int) -> Crash:
    """The power fails when the log's clock shows `at`."""
    issued = sorted((event for event in log.events if event.start <= at), key=lambda event: event.start)
    open_events = [event for event in issued if not _covered(log, event, at)]
    return Crash(
        at=at,
        issued=issued,
        open_events=open_events,
        done=max((number for when, number in log.done if when <= at), default=-1),
    )


def _covered(log: Log, event: Event, at: int) -> bool:
    return any(sync.target == event.target and 0 < event.end < sync.start and 0 < sync.end <= at for sync in log.syncs)


def every_fate(moment: Crash) -> Iterator[dict[int, Fate]]:
    """Every subset of the open events, writes also torn at the first sector and in the middle.

    Keyed by place among the issued.
    """
    choices: list[list[tuple[int, Fate]]] = []
    for place, event in enumerate(moment.issued):
        if event not in moment.open_events:
            continue
        if event.kind != "write":
            fates = [Fate(landed=frozenset()), Fate(landed=frozenset({0}))]
        else:
            count = -(-len(event.data) // SECTOR)
            every = frozenset(range(count))
            first, half = frozenset({0}), frozenset(range(max(1, count // 2)))
            parts = {frozenset[int](), every, first, every - first, half, every - half}
            fates = [Fate(landed=part, piece_nbytes=SECTOR) for part in parts]
        choices.append([(place, fate) for fate in fates])
    for combination in product(*choices):
        yield dict(combination)


def random_fate(moment: Crash, draw: random.Random) -> dict[int, Fate]:
    """Any subset of the open events, writes torn anywhere."""
    fates: dict[int, Fate] = {}
    likely = draw.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    for place, event in enumerate(moment.issued):
        if event in moment.open_events:
            piece = draw.choice([SECTOR, PAGE]) if event.kind == "write" else PAGE
            count = max(1, -(-len(event.data) // piece)) if event.kind == "write" else 1
            if event.kind == "write" and draw.random() < 0.5:
                landed = frozenset(n for n in range(count) if draw.random() < likely)
            else:
                landed = frozenset(range(count)) if draw.random() < likely else frozenset()
            fates[place] = Fate(landed=landed, piece_nbytes=piece)
    return fates


Disk = dict[str, dict[str, bytes]]
"""Folder → name → content."""


def disk_after(moment: Crash, fates: dict[int, Fate]) -> Disk:
    """The files that are found when the power is back."""
    content: dict[int, bytearray] = {}
    names: dict[str, dict[str, int]] = {}
    for place, event in enumerate(moment.issued):
        fate = fates.get(place)
        if event.kind == "write":
            _apply_write(content.setdefault(event.inode, bytearray()), event, fate)
        elif fate is None or fate.landed:
            _apply_name(names.setdefault(str(event.target), {}), event)
    return {
        folder: {name: bytes(content.get(inode, b"")) for name, inode in entries.items()}
        for folder, entries in names.items()
    }


def _apply_write(content: bytearray, event: Event, fate: Fate | None) -> None:
    piece = len(event.data) if fate is None else fate.piece_nbytes
    for number, at in enumerate(range(0, len(event.data), piece)):
        if fate is None or number in fate.landed:
            data = event.data[at : at + piece]
            start = event.offset + at
            if len(content) < start + len(data):
                content.extend(bytes(start + len(data) - len(content)))
            content[start : start + len(data)] = data


def _apply_name(entries: dict[str, int], event: Event) -> None:
    if event.kind in ("create", "link"):
        entries[event.other or event.name] = event.inode
    elif event.kind == "rename":
        if entries.get(event.name) == event.inode:
            del entries[event.name]
        entries[event.other] = event.inode
    else:
        assert event.kind == "unlink", event.kind
        if entries.get(event.name) == event.inode:
            del entries[event.name]


def write_disk(disk: Disk, folders: dict[str, Path]) -> None:
    """Put the files where they can be opened; `folders` maps folders of the log to places."""
    for folder, place in folders.items():
        place.mkdir(mode=0o700, exist_ok=True)
        for name in os.listdir(place):
            os.unlink(place / name)
        for name, content in disk.get(folder, {}).items():
            (place / name).write_bytes(content)
