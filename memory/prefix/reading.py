"""Reading blocks into their places, past the page cache, and checking each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..arena import round_up
from ..disk import DiskEngine, Transfer
from ..errors import PenstockError, StoreDamagedError, UsageError
from ..image import Window
from ..store.checksum import checksum
from .index import Place


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
    """Of the block after them; None where all are good."""


def read_blocks(places: Sequence[Place], into: Sequence[memoryview], engine: DiskEngine) -> ReadOutcome:
    """Read blocks, and compare checksums of those that are there while later ones are read.

    No thread touches `into` once this returns.

    Args:
        places: In order.
        into: For each a writable view of whole pages, at least as long as the block.
        engine: Reads them. Its files stay open until it is closed.
    """
    if len(places) != len(into):
        raise UsageError(f"{len(places)} blocks are to be read into {len(into)} places: give one for each")
    for place, view in zip(places, into, strict=True):
        if view.readonly or view.nbytes < round_up(place.span.nbytes):
            raise UsageError(
                f"a block of {place.span.nbytes} bytes needs {round_up(place.span.nbytes)} writable bytes to be read "
                f"into; there are {view.nbytes}"
            )
    started: list[Transfer] = []
    try:
        for number, (place, view) in enumerate(zip(places, into, strict=True)):
            try:
                started.append(engine.read([_window(place)], [], view.cast("B")))
            except PenstockError as error:
                found = _check(places, into, started)
                return found if found.failure is not None else _failed(number, place, error)
        return _check(places, into, started)
    finally:
        for transfer in started:
            transfer.cancel()
        for transfer in started:
            with suppress(Exception):
                transfer.wait()


def _check(places: Sequence[Place], into: Sequence[memoryview], started: Sequence[Transfer]) -> ReadOutcome:
    for number, transfer in enumerate(started):
        place = places[number]
        try:
            transfer.wait()
        except PenstockError as error:
            return _failed(number, place, error)
        found = checksum(into[number].cast("B")[: place.span.nbytes])
        if found != place.checksum:
            wrong = f"its checksum is {found:016x} and was {place.checksum:016x} when it was stored"
            return _failed(number, place, StoreDamagedError(wrong))
    return ReadOutcome(blocks=len(started), failure=None)


def _failed(number: int, place: Place, error: Exception) -> ReadOutcome:
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
