"""The segments of a folder as one process knows them: found, used, given up."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..errors import DiskError, PenstockError
from ..files import is_shortage
from ..store.files import StoreFiles
from ..store.folder import remove, sync_folder
from .folder import OVERHEAD_NBYTES, file_nbytes, read_segment, segment_names, tick_of
from .index import Index, Place
from .reading import ReadFailure

logger = logging.getLogger(__name__)

_MOST_TICKS: Final = 2**30
"""Later ones are counted anew by the next who writes: some filesystems end at 2^31 seconds. In a folder that was copied
the times of the copying are the ticks, and beyond it."""


class Library:
    """An index, and the folder that it is of. Not thread-safe.

    Args:
        files: The filesystem.
        folder: Of the store.
        readonly: Never change anything but ticks.
    """

    def __init__(self, files: StoreFiles, folder: Path, *, readonly: bool) -> None:
        self._files = files
        self._folder = folder
        self._readonly = readonly
        self._bad: dict[str, int] = {}
        """Files that are left out and stay, with their lengths: they take room."""
        self.index = Index()
        self.evicted = self.spoiled = 0
        """Segments that were given up for room, and because they are bad."""
        self.refresh()
        if not readonly and self.index.tick > _MOST_TICKS:
            self._renumber()

    @property
    def used_nbytes(self) -> int:
        """Of all files of the store."""
        return OVERHEAD_NBYTES + self.index.nbytes + sum(self._bad.values())

    def refresh(self) -> None:
        """Learn of what came and went. A segment that is bad is left out, by the one who writes removed.

        Raises:
            DiskError: the folder cannot be read.
        """
        names = segment_names(self._files, self._folder)
        for name in [name for name in self.index.segments if name not in names]:
            self.index.remove(name)
        for name in [name for name in self._bad if name not in names]:
            del self._bad[name]
        for name in sorted(names - set(self.index.segments) - set(self._bad)):
            try:
                found = read_segment(self._files, self._folder, name)
            except FileNotFoundError:
                continue
            except (PenstockError, OSError) as error:
                if self._readonly and is_shortage(error):
                    continue  # of this process: the next lookup tries again
                if not self._spoil(name, str(error), damaged=not isinstance(error, DiskError | OSError)):
                    self._bad[name] = file_nbytes(self._files, self._folder, name)
            else:
                self.index.add(found.record, found.path, found.tick)

    def use(self, places: Iterable[Place]) -> None:
        """Blocks are used now, all from the first of a sequence on. No file's tick is set back."""
        names = tuple(dict.fromkeys(place.segment for place in places))
        self._hear(names)
        for name in self.index.use(names):
            with suppress(OSError):  # a folder that cannot be written to: then nobody gives anything up in it
                self._files.set_time(str(self._folder / name), self.index.tick)

    def spoil(self, place: Place, failure: ReadFailure) -> None:
        """A block is not what was stored, or cannot be read: its segment is not to be found again."""
        name = place.segment
        if name not in self.index.segments:
            return
        if failure.gone or self._spoil(name, failure.reason, damaged=failure.damaged):
            self.index.remove(name)
        else:
            self.index.hide(name)  # its file still takes room

    def make_room(self, nbytes: int, capacity_nbytes: int, keep: Collection[str]) -> bool:
        """Give up segments until `nbytes` more fit; False where they cannot. Those go first that cannot be read, then
        those that were used longest ago.

        Raises:
            DiskError: a file that can be read cannot be removed.
        """
        kept = sum(self.index.segments[name].record.nbytes for name in keep)
        if OVERHEAD_NBYTES + kept + nbytes > capacity_nbytes:
            return False
        if self.used_nbytes + nbytes > capacity_nbytes:
            self._hear(tuple(self.index.segments))
        for bad in [bad for bad, held in self._bad.items() if held]:
            if self.used_nbytes + nbytes <= capacity_nbytes:
                break
            if self._removed(bad):
                del self._bad[bad]
                self.evicted += 1
        while self.used_nbytes + nbytes > capacity_nbytes:
            name = self.index.victim(keep)
            if name is None:
                return False
            self.give_up(name)
            self.evicted += 1
        return True

    def give_up(self, name: str) -> None:
        """Remove a segment. Whoever reads it reads on.

        Raises:
            DiskError: it stays.
        """
        remove(self._files, str(self._folder / name))
        self.index.remove(name)

    def sync(self) -> None:
        """Bring the folder's names to the medium. Failing is no harm: a name that is lost is a miss."""
        try:
            sync_folder(self._files, str(self._folder))
        except DiskError as error:
            logger.warning("%s; what was stored last may be gone after a power failure", error)

    def _spoil(self, name: str, reason: str, *, damaged: bool) -> bool:
        """Whether its file was removed. One that could not be read may be good: it may be read another time."""
        self.spoiled += 1
        logger.warning("%s is not used: %s. What was in it is computed again.", self._folder / name, reason)
        return not self._readonly and damaged and self._removed(name)

    def _removed(self, name: str) -> bool:
        """Whether a file could be removed."""
        try:
            remove(self._files, str(self._folder / name))
        except DiskError as error:
            logger.warning("%s", error)
            return False
        return True

    def _hear(self, names: Collection[str]) -> None:
        """Learn how others used segments meanwhile: they write it to the files, and each has a count of its own."""
        for name in names:
            with suppress(OSError):  # gone, or it cannot be asked: what is known of it stands
                self.index.hear(name, tick_of(self._files.status(str(self._folder / name))))

    def _renumber(self) -> None:
        ordered = sorted(self.index.segments.values(), key=lambda one: (one.tick, -one.record.first))
        for number, segment in enumerate(ordered):
            segment.tick = self.index.tick = number + 1
            with suppress(OSError):
                self._files.set_time(str(self._folder / segment.record.name), segment.tick)
