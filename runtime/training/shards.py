"""Shards: the pieces in which fp32 masters and optimizer states lie on disk, and in which they are updated.

A shard belongs to one block of weights, and holds some arrays of equal length, one after the other, each starting on a
page: the masters, then the optimizer's states. Its elements are those of one or several parameters of the block, or
some of a large one. Parameters are cut at multiples of GRAIN elements. One that holds the experts of a layer is cut
where one of them ends, as nearly as that allows, so that those which had no token can be left where they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
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


def cut_shards(
    sizes: Sequence[int],
    blocks: Mapping[int, Sequence[int]],
    *,
    most: int = ELEMENTS,
    experts: Sequence[int] = (),
) -> tuple[Shard, ...]:
    """Cut all parameters into shards, block by block.

    Args:
        sizes: Elements of each parameter.
        blocks: The parameters of each block of weights, in the order in which they are to be updated.
        most: Elements of a shard, at most; a multiple of GRAIN.
        experts: How many experts lie in each parameter, one after the other: it has shards of its own. 0 of others.
    """
    assert most % GRAIN == 0, most
    shards: list[Shard] = []
    for block, parameters in blocks.items():
        pieces: list[Piece] = []
        for parameter in parameters:
            count = experts[parameter] if experts else 0
            if count:
                pieces = _end(shards, block, pieces)
                for start, stop in _expert_spans(sizes[parameter], count, most):
                    _end(shards, block, [Piece(parameter=parameter, start=start, stop=stop, at=0)])
                continue
            start = 0
            while start < sizes[parameter]:
                filled = round_up(pieces[-1].at + pieces[-1].elements, GRAIN) if pieces else 0
                if filled >= most:
                    pieces, filled = _end(shards, block, pieces), 0
                stop = min(sizes[parameter], start + most - filled)
                pieces.append(Piece(parameter=parameter, start=start, stop=stop, at=filled))
                start = stop
        _end(shards, block, pieces)
    return tuple(shards)


def _end(shards: list[Shard], block: int, pieces: list[Piece]) -> list[Piece]:
    """Make a shard of pieces, if there are any. Gives those that the next one has so far: none."""
    if pieces:
        shards.append(Shard(id=len(shards), block=block, pieces=tuple(pieces)))
    return []


def _expert_spans(size: int, experts: int, most: int) -> Iterator[tuple[int, int]]:
    """Where each shard of a parameter of so many experts begins and ends; those of a large expert are of like size."""
    nearest = ((size * expert // experts + GRAIN // 2) // GRAIN * GRAIN for expert in range(1, experts))
    edges = sorted({0, size, *(min(edge, size) for edge in nearest)})
    for begin, end in itertools.pairwise(edges):
        parts = -(-(end - begin) // most)
        each = round_up(-(-(end - begin) // parts), GRAIN)
        for start in range(begin, end, each):
            yield start, min(start + each, end)


def blocks_of(shards: Sequence[Shard], count: int) -> list[int]:
    """The block of each of so many parameters."""
    blocks = [SMALL] * count
    for shard in shards:
        for piece in shard.pieces:
            blocks[piece.parameter] = shard.block
    return blocks
