"""Reading committed blocks back and comparing their checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from ..arena import HostArena, round_up
from ..disk import DiskEngine
from ..errors import DiskError
from ..image import Window
from ..layout import FileSpan
from .checksum import RunningChecksum
from .manifest import Manifest
from .slotmap import SlotMap

_PIECE: Final = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class BadBlock:
    """A committed block that is not what was committed."""

    block: int
    name: str
    kind: str
    path: str
    offset: int
    nbytes: int
    expected_checksum: int
    found_checksum: int | None
    """None where it could not be read."""
    reason: str


class BlockReader:
    """Reads blocks of any size through two pieces of memory, one being read while the other is summed up."""

    def __init__(self, engine: DiskEngine | None = None) -> None:
        self._own = engine is None
        self._engine = engine or DiskEngine()
        self._arena = HostArena(2 * _PIECE, tier="verify")

    def checksum(self, span: FileSpan) -> int:
        """The checksum of a span that starts on a page.

        Raises:
            DiskError: it cannot be read.
        """
        found = RunningChecksum()
        starts = range(0, span.nbytes, _PIECE)
        pieces = [FileSpan(path=span.path, offset=at, nbytes=min(_PIECE, span.nbytes - at)) for at in starts]
        buffer = self._arena.buffer
        under_way = None
        try:
            for number, piece in enumerate(pieces):
                transfer = under_way or self._engine.read([_window(span, piece, 0)], [], buffer)
                at = number % 2 * _PIECE
                under_way = None
                if number + 1 < len(pieces):
                    under_way = self._engine.read([_window(span, pieces[number + 1], _PIECE - at)], [], buffer)
                transfer.wait()
                found.update(buffer[at : at + piece.nbytes])
        finally:
            if under_way is not None:  # the buffer is used again
                under_way.cancel()
                with suppress(DiskError):
                    under_way.wait()
        return found.value()

    def close(self) -> None:
        """Stop the threads, unless the engine is the caller's."""
        if self._own:
            self._engine.close()
        self._arena.close()


def _window(span: FileSpan, piece: FileSpan, offset: int) -> Window:
    return Window(
        path=span.path,
        file_offset=span.offset + piece.offset,
        nbytes=round_up(piece.nbytes),
        needed_nbytes=piece.nbytes,
        offset=offset,
        data_offset=offset,
        final_offset=offset,
        data_nbytes=piece.nbytes,
        skew=0,
    )


def check_blocks_read(
    manifest: Manifest,
    slotmap: SlotMap,
    blocks: Iterable[int] | None = None,
    *,
    engine: DiskEngine | None = None,
    on_block: Callable[[int], None] | None = None,
) -> list[BadBlock]:
    """Read the committed blocks, or some of them, and list those that are bad. `on_block` is called after each."""
    reader = BlockReader(engine)
    bad: list[BadBlock] = []
    try:
        for block in range(len(manifest.blocks)) if blocks is None else blocks:
            found = _examine(reader, manifest, slotmap, block) if manifest.blocks[block].written else None
            if found is not None:
                bad.append(found)
            if on_block is not None:
                on_block(block)
    finally:
        reader.close()
    return bad


def _examine(reader: BlockReader, manifest: Manifest, slotmap: SlotMap, block: int) -> BadBlock | None:
    record = manifest.blocks[block]
    span = slotmap.span(block, record.slot)
    found: int | None = None
    try:
        found = reader.checksum(span)
        if found == record.checksum:
            return None
        reason = f"its checksum is {found:016x} and was {record.checksum:016x} when it was committed"
    except DiskError as error:
        reason = str(error)
    return BadBlock(
        block=block,
        name=record.name,
        kind=record.kind,
        path=span.path,
        offset=span.offset,
        nbytes=span.nbytes,
        expected_checksum=record.checksum,
        found_checksum=found,
        reason=reason,
    )
