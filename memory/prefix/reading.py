"""Reading blocks into their places, past the page cache, and checking each."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from ..arena import round_up
from ..disk import DiskEngine
from ..errors import PenstockError, StoreDamagedError, UsageError
from ..files import is_shortage
from ..image import Window
from ..store.checksum import checksum
from ..transfer import Transfer
from .index import Place

logger = logging.getLogger(__name__)

_FILES: Final = 8
"""Of a window: 256 MiB of large segments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadFailure:
    """Why a block was not read."""

    reason: str
    damaged: bool
    """Whether it was read, and is not what was stored."""
    gone: bool
    """Whether its file is not there any more, which is no fault."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOutcome:
    """What came of a read."""

    blocks: int
    """That are what was stored, from the first one on."""
    failure: ReadFailure | None
    """Of the block after them; None where all are good, or where this process was short of descriptors or memory."""


def read_blocks(
    places: Sequence[Place],
    into: Sequence[memoryview],
    engine: DiskEngine,
    *,
    wanted: Callable[[], bool] = lambda: True,
) -> ReadOutcome:
    """Read blocks, and compare checksums of those that are there while later ones are read.

    A long hit is in many files: they are open a few at a time, two windows of them, one being read while the other is
    checked. No thread touches `into` once this returns.

    Args:
        places: In order.
        into: For each a writable view of whole pages, at least as long as the block.
        engine: Reads them; for this call alone, since files are closed when they are read.
        wanted: Whether to go on, asked before each block is waited for. What was checked by then is good.
    """
    if len(places) != len(into):
        raise UsageError(f"{len(places)} blocks are to be read into {len(into)} places: give one for each")
    for place, view in zip(places, into, strict=True):
        if view.readonly or view.nbytes < round_up(place.span.nbytes):
            raise UsageError(
                f"a block of {place.span.nbytes} bytes needs {round_up(place.span.nbytes)} writable bytes to be read "
                f"into; there are {view.nbytes}"
            )
    under_way = deque[_Part]()
    starts = _windows(places)
    try:
        for start, end in pairwise([*starts, len(places)]):
            under_way.append(part := _Part(start=start))
            unable: ReadOutcome | None = None
            for number in range(start, end):
                try:
                    part.transfers.append(engine.read([_window(places[number])], [], into[number].cast("B")))
                except PenstockError as error:
                    unable = _failed(number, places[number], error)
                    break
            while len(under_way) > 1 or (under_way and (unable is not None or end == len(places))):
                found = _check(places, into, under_way[0], wanted)
                if found is not None:
                    return found
                checked = under_way.popleft()
                _close(engine, places, checked, under_way)
            if unable is not None:
                return unable
        return ReadOutcome(blocks=len(places), failure=None)
    finally:
        transfers = [transfer for part in under_way for transfer in part.transfers]
        for transfer in transfers:
            transfer.cancel()
        for transfer in transfers:
            with suppress(Exception):
                transfer.wait()


@dataclass(kw_only=True, slots=True)
class _Part:
    """Blocks of one window that are being read."""

    start: int
    transfers: list[Transfer] = field(default_factory=list)

    def paths(self, places: Sequence[Place]) -> set[str]:
        return {place.span.path for place in places[self.start : self.start + len(self.transfers)]}


def _windows(places: Sequence[Place]) -> list[int]:
    """Where windows start, each of blocks of at most `_FILES` files."""
    starts: list[int] = []
    paths: set[str] = set()
    for number, place in enumerate(places):
        if not starts or (place.span.path not in paths and len(paths) == _FILES):
            starts.append(number)
            paths = set()
        paths.add(place.span.path)
    return starts


def _check(
    places: Sequence[Place], into: Sequence[memoryview], part: _Part, wanted: Callable[[], bool]
) -> ReadOutcome | None:
    """Wait for blocks; None where all are good."""
    for number, transfer in enumerate(part.transfers, part.start):
        if not wanted():
            return ReadOutcome(blocks=number, failure=None)
        place = places[number]
        try:
            transfer.wait()
        except PenstockError as error:
            return _failed(number, place, error)
        found = checksum(into[number].cast("B")[: place.span.nbytes])
        if found != place.checksum:
            wrong = f"its checksum is {found:016x} and was {place.checksum:016x} when it was stored"
            return _failed(number, place, StoreDamagedError(wrong))
    return None


def _close(engine: DiskEngine, places: Sequence[Place], checked: _Part, under_way: Iterable[_Part]) -> None:
    needed = {path for part in under_way for path in part.paths(places)}
    for path in checked.paths(places) - needed:
        engine.files.forget(path)


def _failed(number: int, place: Place, error: Exception) -> ReadOutcome:
    if is_shortage(error):
        logger.warning("%s", error)
        return ReadOutcome(blocks=number, failure=None)
    return ReadOutcome(
        blocks=number,
        failure=ReadFailure(
            reason=str(error),
            damaged=isinstance(error, StoreDamagedError),
            gone=not os.path.exists(place.span.path),
        ),
    )


def _window(place: Place) -> Window:
    span = place.span
    return Window(
        path=span.path,
        file_offset=span.offset,
        nbytes=round_up(span.nbytes),
        needed_nbytes=span.nbytes,
        offset=0,
        data_offset=0,
        final_offset=0,
        data_nbytes=span.nbytes,
        skew=0,
    )
