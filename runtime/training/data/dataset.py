"""The data of a fine-tuning run: opened, split, packed, and given out as batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ....memory.errors import UsageError
from .batches import Batch, Batches, evaluation_batches
from .order import split
from .packing import CutPacking, Indices, Packing, WholePacking
from .position import DataIdentity, Position
from .sequences import DataStatistics, Sequences
from .tokenfile import TokenFile
from .tokenizing import TokenizingProgress, tokenized

TooLong = Literal["truncate", "leave-out", "refuse"]
"""What becomes of a conversation, or a prompt with its response, that is longer than a sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """How documents become sequences."""

    seq: int
    """Tokens of a sequence."""
    eval_fraction: float = 0.0
    """Share of the documents that is set aside for evaluation."""
    seed: int = 0
    """Of the split, and of the order of each epoch."""
    too_long: TooLong = "truncate"
    """Texts are cut and go on in the next sequence in any case."""
    eos: bool = True
    """Whether texts and responses end with the tokenizer's end of text."""

    def __post_init__(self) -> None:
        if self.seq < 2:
            raise UsageError(
                f"seq={self.seq} has no meaning: a token is learnt from those before it, so give 2 or more"
            )
        if not 0 <= self.eval_fraction < 1:
            raise UsageError(f"eval_fraction={self.eval_fraction} has no meaning: give 0 (none) or a share below 1")
        if self.seed < 0:
            raise UsageError(f"seed={self.seed} has no meaning: give 0 or more")
        if self.too_long not in ("truncate", "leave-out", "refuse"):
            raise UsageError(f"too_long={self.too_long!r} has no meaning: give truncate, leave-out or refuse")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingData:
    """A source file as sequences of tokens."""

    training: Sequences
    evaluation: Sequences | None
    """None where nothing is set aside."""
    identity: DataIdentity
    largest_id: int
    """A model needs more embeddings than this."""

    def batches(self, *, batch: int, accumulate: int = 1, position: Position | None = None) -> Batches:
        """Training batches, from the beginning or from where a run was.

        Raises:
            UsageError: the position is of other data, or of other options; the message says which.
        """
        if position is None:
            position = Position(identity=self.identity)
        differences = position.identity.differences(self.identity)
        if differences:
            raise UsageError(
                f"the run cannot go on where it was in its data: {'; '.join(differences)}. Give what it began with, or "
                "begin a new run"
            )
        return Batches(self.training, batch=batch, accumulate=accumulate, position=position)

    def evaluation_batches(self, *, batch: int) -> Iterator[Batch]:
        """The evaluation's sequences once, in order; none where nothing is set aside."""
        return iter(()) if self.evaluation is None else evaluation_batches(self.evaluation, batch=batch)


def open_data(
    path: Path,
    tokenizer: Any,
    *,
    folder: Path,
    options: DataOptions,
    progress: Callable[[TokenizingProgress], None] | None = None,
) -> TrainingData:
    """The data of a run. It is tokenized on first use, into a file of the folder that later runs map.

    Args:
        path: A .jsonl, .txt or .parquet file.
        tokenizer: One of transformers'.
        folder: The run's.
        options: How documents become sequences.
        progress: Told about every MiB of text while it is tokenized.

    Raises:
        UsageError: a row is none, a document is too long and that is to be refused, or nothing is left to train on.
        CheckpointError: the tokenizer fails.
        DiskError: the source cannot be read, or the tokens not be written.
    """
    told = {} if progress is None else {"progress": progress}
    file = tokenized(path, tokenizer, folder=folder, eos=options.eos, **told)
    train, aside = split(len(file), fraction=options.eval_fraction, seed=options.seed)
    training = _pack(file, train, options, path)
    if not len(training):
        raise UsageError(
            f"{path} leaves nothing to train on: of {len(file)} documents {len(aside)} are for evaluation and "
            f"{training.statistics.left_out} were left out; give more data, or a larger seq than {options.seq}"
        )
    return TrainingData(
        training=training,
        evaluation=_pack(file, aside, options, path) if len(aside) else None,
        identity=DataIdentity(
            tokens=file.digest,
            seq=options.seq,
            eval_fraction=options.eval_fraction,
            seed=options.seed,
            too_long=options.too_long,
        ),
        largest_id=file.largest,
    )


def _pack(file: TokenFile, documents: Indices, options: DataOptions, path: Path) -> Sequences:
    """The sequences of some of the documents, numbers ascending."""
    lengths = file.lengths()[documents]
    packing: Packing
    if file.loss is None:
        packing = CutPacking(documents, lengths, seq=options.seq)
        tokens = min(int(lengths.sum()), len(packing) * options.seq)
        left_out = int(tokens < lengths.sum() and lengths[-1] == 1)
        statistics = DataStatistics(
            documents=len(documents) - left_out,
            tokens=tokens,
            loss_tokens=tokens - len(packing),  # nothing precedes a sequence's first
            sequences=len(packing),
            padding=len(packing) * options.seq - tokens,
            truncated=0,
            left_out=left_out,
        )
    else:
        learnt = _learnt(file, documents, lengths, options, path)
        taken = learnt > 0
        kept = np.minimum(lengths[taken], options.seq)
        packing = WholePacking(documents[taken], kept, seq=options.seq)
        statistics = DataStatistics(
            documents=int(taken.sum()),
            tokens=int(kept.sum()),
            loss_tokens=int(learnt.sum()),
            sequences=len(packing),
            padding=len(packing) * options.seq - int(kept.sum()),
            truncated=int((lengths[taken] > options.seq).sum()),
            left_out=int((~taken).sum()),
        )
    return Sequences(file, packing, seq=options.seq, pad=int(file.made_of["pad"]), statistics=statistics)


def _learnt(file: TokenFile, documents: Indices, lengths: Indices, options: DataOptions, path: Path) -> Indices:
    """[documents] their tokens with loss that fit into a sequence; 0 where a document is left out."""
    assert file.loss is not None
    learnt = file.documents["loss"][documents].astype(np.int64)
    long = np.flatnonzero(lengths > options.seq)
    if len(long) and options.too_long == "refuse":
        longest = long[int(np.argmax(lengths[long]))]
        line = int(file.documents["line"][documents[longest]])
        raise UsageError(
            f"{path}: {len(long)} of {len(documents)} rows have more tokens than seq={options.seq}, the longest, at "
            f"{line}, {lengths[longest]}: raise seq, shorten them, or have them truncated or left out"
        )
    for place in long:
        begin = file.begin(int(documents[place]))
        fits = file.loss[begin : begin + options.seq]
        learnt[place] = int(fits.sum()) if options.too_long == "truncate" else 0
    return learnt
