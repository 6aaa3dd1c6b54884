"""Batches for training, epoch after epoch without end, and for evaluation, once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ....memory.errors import UsageError
from .order import epoch_order
from .position import Position
from .sequences import NO_DOCUMENT, NO_LOSS, Sequences

_FIELDS: Final = ("input_ids", "labels", "position_ids", "documents")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Some sequences. Tensors are int64 [batch, seq], on the CPU."""

    input_ids: Tensor
    labels: Tensor
    """`input_ids`, and -100 where there is no loss. The model shifts them."""
    position_ids: Tensor
    """From 0 in each document's piece, and in the padding. transformers reads from these that documents do not see each
    other, as long as there is no cache and no attention mask; a model that is not given them takes the sequence for one
    text."""
    documents: Tensor
    """Numbers of the documents, -1 in the padding: for an attention mask of one's own."""
    tokens: int
    """Padding not counted."""
    loss_tokens: int
    """Labels that are predicted: those with loss, but for a sequence's first. What a loss summed over several batches
    is divided by."""

    def inputs(self, *, positions: bool = True) -> dict[str, Any]:
        """What a causal language model of transformers is called with.

        Args:
            positions: Whether documents are kept apart by `position_ids`.
        """
        # With a cache, which many configs ask for, transformers would take the positions for those of one text.
        named = {"input_ids": self.input_ids, "labels": self.labels, "use_cache": False}
        return {**named, "position_ids": self.position_ids} if positions else named


class Batches:
    """Training batches. All are full: where an epoch has no more sequences, those of the next follow.

    The order of an epoch is a function of the seed and the epoch's number, so that a position suffices to go on.

    Args:
        sequences: What to train on; at least one.
        batch: Sequences of a batch.
        accumulate: Batches of an optimizer step.
        position: Where to go on, or to begin.

    Raises:
        UsageError: a number is not positive, or the position is not one of these sequences.
    """

    def __init__(self, sequences: Sequences, *, batch: int, accumulate: int = 1, position: Position) -> None:
        for name, value in (("batch", batch), ("accumulate", accumulate)):
            if value < 1:
                raise UsageError(f"{name}={value} has no meaning: give 1 or more")
        if not len(sequences):
            raise UsageError("there is no sequence to train on: give more data, or a smaller eval_fraction")
        if position.index >= len(sequences):
            raise UsageError(
                f"the position is at sequence {position.index} of an epoch that has {len(sequences)}: it is of other "
                "data; begin a new run"
            )
        self._sequences = sequences
        self._batch = batch
        self._accumulate = accumulate
        self._position = position
        self._order = self._order_of(position.epoch)

    @property
    def position(self) -> Position:
        """Behind the last batch that was given."""
        return self._position

    def __iter__(self) -> Iterator[Batch]:
        """This object: there is one position."""
        return self

    def __next__(self) -> Batch:
        """The next batch; there always is one."""
        epoch, index = self._position.epoch, self._position.index
        chosen = []
        for _ in range(self._batch):
            chosen.append(int(self._order[index]))
            index += 1
            if index == len(self._sequences):
                epoch, index = epoch + 1, 0
                self._order = self._order_of(epoch)
        found = collate(self._sequences, chosen)
        self._position = replace(
            self._position,
            epoch=epoch,
            index=index,
            batches=self._position.batches + 1,
            tokens=self._position.tokens + found.tokens,
            loss_tokens=self._position.loss_tokens + found.loss_tokens,
        )
        return found

    def step(self) -> tuple[Batch, ...]:
        """The batches of the next optimizer step."""
        return tuple(next(self) for _ in range(self._accumulate))

    def steps(self, epochs: float) -> int:
        """Optimizer steps until every sequence was seen this many times; the last is filled up from the next epoch."""
        return max(int(np.ceil(epochs * len(self._sequences) / (self._batch * self._accumulate))), 1)

    def _order_of(self, epoch: int) -> np.ndarray:
        return epoch_order(len(self._sequences), seed=self._position.identity.seed, epoch=epoch)


def evaluation_batches(sequences: Sequences, *, batch: int) -> Iterator[Batch]:
    """All sequences once, in order. The last batch may be smaller.

    Raises:
        UsageError: `batch` is not positive.
    """
    if batch < 1:
        raise UsageError(f"batch={batch} has no meaning: give 1 or more")
    for begin in range(0, len(sequences), batch):
        yield collate(sequences, range(begin, min(begin + batch, len(sequences))))


def collate(sequences: Sequences, indices: Iterable[int]) -> Batch:
    """A batch of these sequences.

    Raises:
        DiskError: the tokens are damaged.
    """
    chosen = [sequences[index] for index in indices]
    stacked = {name: torch.from_numpy(np.stack([getattr(each, name) for each in chosen])) for name in _FIELDS}
    return Batch(
        **stacked,
        tokens=int((stacked["documents"] != NO_DOCUMENT).sum()),
        loss_tokens=int((stacked["labels"][:, 1:] != NO_LOSS).sum()),
    )
