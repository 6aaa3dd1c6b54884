"""What is in the store: where each block is, and which segment goes when there is no room."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..layout import FileSpan
from .segment import SegmentRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a block is."""

    segment: str
    span: FileSpan
    checksum: int


@dataclass(kw_only=True, slots=True)
class Segment:
    """A segment that is there."""

    record: SegmentRecord
    tick: int
    """When it was used last, on a clock that ticks with each use."""


class Index:
    """Segments by name and blocks by key. Not thread-safe; nothing of it is on disk but the ticks.

    A use of a block is a use of all before it, in whatever segments they are. So a segment was never used later than
    those that its blocks follow, and the one that was used longest ago is never in the middle of a sequence.
    """

    def __init__(self) -> None:
        self.segments: dict[str, Segment] = {}
        self.places: dict[bytes, Place] = {}
        self._others: dict[bytes, list[Place]] = {}
        """Of blocks that several segments have: where else they are."""
        self.nbytes = 0
        """Of all segments' files."""
        self.tick = 0
        """The latest."""
        self._latest: tuple[str, ...] = ()

    def add(self, record: SegmentRecord, path: str, tick: int) -> None:
        """A segment is there. Of two that have the same block, the first one that was added is read."""
        self.segments[record.name] = Segment(record=record, tick=tick)
        self.nbytes += record.nbytes
        self.tick = max(self.tick, tick)
        for block in record.blocks:
            span = FileSpan(path=path, offset=block.offset, nbytes=block.nbytes)
            place = Place(segment=record.name, span=span, checksum=block.checksum)
            if self.places.setdefault(block.key, place) is not place:
                self._others.setdefault(block.key, []).append(place)

    def remove(self, name: str) -> None:
        """A segment is gone."""
        self.hide(name)
        self.nbytes -= self.segments.pop(name).record.nbytes
        self._latest = ()

    def hide(self, name: str) -> None:
        """A segment's blocks are not to be found in it any more, though it is still there."""
        for block in self.segments[name].record.blocks:
            first = self.places.get(block.key)
            if first is None:
                continue
            left = [place for place in (first, *self._others.pop(block.key, ())) if place.segment != name]
            if left:
                self.places[block.key] = left[0]
            else:
                del self.places[block.key]
            if left[1:]:
                self._others[block.key] = left[1:]

    def find(self, keys: Iterable[bytes]) -> tuple[Place, ...]:
        """Places of the first blocks of a sequence, up to the first one that is not there."""
        found = []
        for key in keys:
            place = self.places.get(key)
            if place is None:
                break
            found.append(place)
        return tuple(found)

    def hear(self, name: str, tick: int) -> None:
        """Somebody else used a segment."""
        segment = self.segments[name]
        if tick > segment.tick:
            segment.tick = tick
            self.tick = max(self.tick, tick)
            self._latest = ()

    def use(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Segments are used now, together. Returns those whose tick changed to `tick` with it."""
        if names == self._latest:
            return ()
        self._latest = names
        self.tick += 1
        for name in names:
            self.segments[name].tick = self.tick
        return names

    def victim(self, keep: Collection[str]) -> str | None:
        """The segment that was used longest ago, of two that were used together the one that follows the other."""
        free = [segment for name, segment in self.segments.items() if name not in keep]
        if not free:
            return None
        return min(free, key=lambda one: (one.tick, -one.record.first, one.record.name)).record.name

    def orphans(self) -> list[str]:
        """Segments whose blocks nobody can find, since one before them is gone; and those that follow them."""
        reachable = {segment.record.root for segment in self.segments.values()}
        left = sorted(self.segments.values(), key=lambda one: one.record.first)
        lost = []
        for segment in left:
            if segment.record.parent in reachable:
                reachable.update(block.key for block in segment.record.blocks)
            else:
                lost.append(segment.record.name)
        return lost
