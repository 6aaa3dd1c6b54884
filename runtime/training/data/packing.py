"""Which part of which document goes into which sequence."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Some tokens of a document."""

    document: int
    begin: int
    """In tokens from the document's first."""
    end: int


class Packing(Protocol):
    """Sequences as pieces of documents."""

    def __len__(self) -> int:
        """How many sequences there are."""

    def pieces(self, index: int) -> list[Piece]:
        """What a sequence is made of, in order. Together not longer than a sequence; what is left is filled up."""


class CutPacking:
    """Documents one behind the other, cut every `seq` tokens. A last token that would be alone is left out: nothing can
    be learnt from it.

    Args:
        documents: [n] their numbers.
        lengths: [n] in tokens, each at least one.
        seq: Tokens of a sequence, at least two.
    """

    def __init__(self, documents: Indices, lengths: Indices, *, seq: int) -> None:
        self._documents = documents
        self._ends = np.cumsum(lengths)
        self._seq = seq
        self._total = int(self._ends[-1]) if len(lengths) else 0
        whole, rest = divmod(self._total, seq)
        self._count = whole + (rest >= 2)

    def __len__(self) -> int:
        return self._count

    def pieces(self, index: int) -> list[Piece]:
        """The documents, or parts of them, under this window."""
        at, end = index * self._seq, min((index + 1) * self._seq, self._total)
        found = []
        place = int(np.searchsorted(self._ends, at, side="right"))
        while at < end:
            begin = int(self._ends[place - 1]) if place else 0
            stop = min(end, int(self._ends[place]))
            found.append(Piece(document=int(self._documents[place]), begin=at - begin, end=stop - begin))
            at = stop
            place += 1
        return found


class WholePacking:
    """Documents that stay whole, several to a sequence where they fit; ascending inside of it.

    Args:
        documents: [n] their numbers, ascending.
        lengths: [n] tokens that are taken of each, at most `seq`.
        seq: Tokens of a sequence.
    """

    def __init__(self, documents: Indices, lengths: Indices, *, seq: int) -> None:
        sequence = best_fit(lengths, seq)
        order = np.argsort(sequence, kind="stable")
        self._count = int(sequence.max()) + 1 if len(sequence) else 0
        self._begins = np.searchsorted(sequence[order], np.arange(self._count + 1))
        self._documents = documents[order]
        self._lengths = lengths[order]

    def __len__(self) -> int:
        return self._count

    def pieces(self, index: int) -> list[Piece]:
        """The documents of this sequence."""
        mine = slice(self._begins[index], self._begins[index + 1])
        return [
            Piece(document=int(document), begin=0, end=int(length))
            for document, length in zip(self._documents[mine], self._lengths[mine], strict=True)
        ]


def best_fit(lengths: Indices, seq: int) -> Indices:
    """[n] the sequence of each document: longest first, each into the fullest sequence that has room for it."""
    found = np.empty(len(lengths), np.int64)
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, ascending
    count = 0
    for item in np.argsort(-lengths, kind="stable"):
        length = int(lengths[item])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, sequence = seq, count
            count += 1
        else:
            room = rooms[place]
            sequence = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        left = room - length
        if left > 0:
            if left not in by_room:
                by_room[left] = []
                insort(rooms, left)
            by_room[left].append(sequence)
        found[item] = sequence
    return found
