"""Sequences of tokens with their labels, as packing has them, put together when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ....memory.errors import DiskError
from .packing import Packing
from .tokenfile import TokenFile

NO_LOSS: Final = -100
"""The label that torch's cross-entropy skips."""
NO_DOCUMENT: Final = -1
"""Whose the padding is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataStatistics:
    """What there is to train on, or to evaluate on."""

    documents: int
    """That are in sequences, as a whole or in part."""
    tokens: int
    """Of documents, padding not counted."""
    loss_tokens: int
    """That a model is asked to predict in one epoch."""
    sequences: int
    padding: int
    """Tokens that only fill up sequences."""
    truncated: int
    """Documents whose end does not fit into a sequence and was cut off."""
    left_out: int
    """Documents in no sequence: too long by the option chosen, or with nothing to learn once truncated."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sequence:
    """One sequence. Arrays are int64 [seq]."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    """`input_ids`, and -100 where there is no loss. The model shifts them."""
    position_ids: NDArray[np.int64]
    """From 0 in each document's piece, and in the padding."""
    documents: NDArray[np.int64]
    """Numbers of the documents, -1 in the padding."""


class Sequences:
    """All sequences of one side of the split. The file must outlive it.

    Args:
        file: The tokens.
        packing: Which of them go where.
        seq: Tokens of a sequence.
        pad: The id that fills up.
        statistics: Of these sequences.
    """

    def __init__(self, file: TokenFile, packing: Packing, *, seq: int, pad: int, statistics: DataStatistics) -> None:
        self.seq = seq
        self.statistics = statistics
        self._file = file
        self._packing = packing
        self._pad = pad

    def __len__(self) -> int:
        return len(self._packing)

    def __getitem__(self, index: int) -> Sequence:
        """The sequence of this number, from 0.

        Raises:
            IndexError: there is none.
            DiskError: the tokens are damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there is no sequence {index}: there are {len(self)}")
        ids = np.full(self.seq, self._pad, np.int64)
        labels = np.full(self.seq, NO_LOSS, np.int64)
        positions = np.empty(self.seq, np.int64)
        documents = np.full(self.seq, NO_DOCUMENT, np.int64)
        at = 0
        for piece in self._packing.pieces(index):
            begin = self._file.begin(piece.document)
            read = slice(begin + piece.begin, begin + piece.end)
            here = slice(at, at + piece.end - piece.begin)
            ids[here] = self._file.tokens[read]
            labels[here] = ids[here]
            if self._file.loss is not None:
                labels[here][self._file.loss[read] == 0] = NO_LOSS
            positions[here] = np.arange(piece.end - piece.begin)
            documents[here] = piece.document
            at = here.stop
        positions[at:] = np.arange(self.seq - at)
        if at and int(ids[:at].max()) > self._file.largest:
            raise DiskError(f"{self._file.path} is damaged in sequence {index}: remove it, so that it is made again")
        return Sequence(input_ids=ids, labels=labels, position_ids=positions, documents=documents)
