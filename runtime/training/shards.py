"""Shards: the pieces in which fp32 masters and optimizer states lie on disk, and in which they are updated.

A shard belongs to one block of weights, and holds some arrays of equal length, one after the other, each starting on a
page: the masters, then the optimizer's states. Its elements are those of one or several parameters of the block, or
some of a large one. Parameters are cut at multiples of GRAIN elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ...memory.arena import PAGE, round_up

ELEMENTS: Final = 1 << 20
"""Of a shard, at most: 12 MiB with AdamW. Three of them are under way at a time."""
GRAIN: Final = PAGE // 4
"""Elements that a cut is a multiple of: a page of fp32. Optimizers ask for less."""
SMALL: Final = 0
"""The block of small tensors, which is lent for good and cannot be withdrawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Elements `start` to `stop` of a parameter, counted as they lie in memory."""

    parameter: int
    """Its number among those that are trained."""
    start: int
    stop: int
    at: int
    """Where the first of them is in the shard."""

    @property
    def elements(self) -> int:
        """How many."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One unit of reading, updating and writing."""

    id: int
    block: int
    """Of weights."""
    pieces: tuple[Piece, ...]

    @property
    def elements(self) -> int:
        """Of each array, all pieces together."""
        return self.pieces[-1].at + self.pieces[-1].elements

    @property
    def array_nbytes(self) -> int:
        """From the start of one array to the start of the next."""
        return round_up(4 * self.elements)


def cut_shards(sizes: Sequence[int], blocks: Mapping[int, Sequence[int]], *, most: int = ELEMENTS) -> tuple[Shard, ...]:
    """Cut all parameters into shards, block by block.

    Args:
        sizes: Elements of each parameter.
        blocks: The parameters of each block of weights, in the order in which they are to be updated.
        most: Elements of a shard, at most; a multiple of GRAIN.
    """
    assert most % GRAIN == 0, most
    shards: list[Shard] = []
    for block, parameters in blocks.items():
        pieces: list[Piece] = []
        filled = 0
        for parameter in parameters:
            start = 0
            while start < sizes[parameter]:
                if filled >= most:
                    shards.append(Shard(id=len(shards), block=block, pieces=tuple(pieces)))
                    pieces, filled = [], 0
                stop = min(sizes[parameter], start + most - filled)
                pieces.append(Piece(parameter=parameter, start=start, stop=stop, at=filled))
                filled = round_up(filled + stop - start, GRAIN)
                start = stop
        if pieces:
            shards.append(Shard(id=len(shards), block=block, pieces=tuple(pieces)))
    return tuple(shards)


def blocks_of(shards: Sequence[Shard], count: int) -> list[int]:
    """The block of each of so many parameters."""
    blocks = [SMALL] * count
    for shard in shards:
        for piece in shard.pieces:
            blocks[piece.parameter] = shard.block
    return blocks
