"""The tokens of a source file: those of an earlier run where they still hold, else made anew."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ....memory.errors import CheckpointError, DiskError, UsageError
from .encoding import Encoder
from .fingerprint import source_fingerprint, tokenizer_fingerprint
from .pieces import cut
from .rows import ChatRow, Kind, PairRow, TextRow
from .sources import Located, Source, open_source
from .tokenfile import TokenFile, read_token_file
from .tokenwriter import TokenWriter

logger = logging.getLogger(__name__)

FILE_NAME: Final = "data.tokens"

_VERSION: Final = 1
"""Of how rows become tokens; files of another are made again."""
_TOGETHER_CHARACTERS: Final = 2**20
"""Texts handed to the tokenizer at once: it works on several in parallel."""
_TELL_NBYTES: Final = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizingProgress:
    """How far tokenizing has come."""

    nbytes: int
    """Of the source, read."""
    of_nbytes: int
    """The source's size."""
    documents: int
    tokens: int


def _nobody(progress: TokenizingProgress) -> None:
    """Nobody wants to know."""


def tokenized(
    path: Path,
    tokenizer: Any,
    *,
    folder: Path,
    eos: bool = True,
    progress: Callable[[TokenizingProgress], None] = _nobody,
) -> TokenFile:
    """The tokens of a source file, kept in a folder.

    Tokens that are there are taken when source (size, time of change, first and last bytes), tokenizer and options are
    those that they were made of.

    Args:
        path: A .jsonl, .txt or .parquet file.
        tokenizer: One of transformers'.
        folder: Where the tokens are kept, most often the run's; made where it is missing.
        eos: Whether documents end with the tokenizer's end of text.
        progress: Told about every MiB of text.

    Raises:
        UsageError: a row is none, or cannot be tokenized; the message names file and line.
        CheckpointError: the tokenizer or its chat template fails.
        DiskError: the source cannot be read, or the tokens not be written.
        ScratchBusyError: another process is tokenizing into this folder.
    """
    source = open_source(path)
    made_of: dict[str, Any] = {
        "version": _VERSION,
        "source": source_fingerprint(path),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "eos": eos,
    }
    target = folder / FILE_NAME
    kept = _kept(target, made_of, path)
    if kept is not None:
        return kept
    encoder = Encoder(tokenizer, eos=eos)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot make the folder {folder}: {error.strerror}; name another") from error
    with TokenWriter(target, vocabulary=encoder.vocabulary) as writer:
        kind = _Tokenizing(source, encoder, writer, made_of["source"]["nbytes"], progress).run()
        if source_fingerprint(path) != made_of["source"]:
            raise DiskError(f"{path} was changed while it was read: run again when nobody writes it")
        writer.finish({**made_of, "kind": kind, "pad": encoder.pad})
    made = read_token_file(target)
    logger.info("%s: %d documents, %d tokens in %s", path, len(made), len(made.tokens), target)
    return made


def _kept(target: Path, made_of: dict[str, Any], path: Path) -> TokenFile | None:
    """The tokens that are there, if they are of this source, tokenizer and options."""
    try:
        kept = read_token_file(target)
    except FileNotFoundError:
        return None
    except DiskError as error:
        logger.warning("%s; %s is tokenized again", error, path)
        return None
    differing = [key for key, value in made_of.items() if kept.made_of.get(key) != value]
    if differing:
        logger.warning("%s: %s changed since it was tokenized, so it is again", path, " and ".join(differing))
        return None
    logger.info("%s: tokens are taken from %s", path, target)
    return kept


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A piece of a text, waiting for others to be tokenized with."""

    located: Located
    text: str
    first: bool
    last: bool


class _Tokenizing:
    """One pass over a source."""

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        writer: TokenWriter,
        of_nbytes: int,
        progress: Callable[[TokenizingProgress], None],
    ) -> None:
        self._source = source
        self._encoder = encoder
        self._writer = writer
        self._of_nbytes = of_nbytes
        self._progress = progress
        self._told_nbytes = 0
        self._first: tuple[Kind, int] | None = None
        """What the first row holds, and where it stands."""

    def run(self) -> Kind:
        """Write all rows; returns what they hold."""
        parts: list[_Part] = []
        characters = 0
        for located in self._source.rows():
            self._check_kind(located)
            if isinstance(located.row, TextRow):
                for part in _parts(located, located.row):
                    parts.append(part)
                    characters += len(part.text)
                    if characters >= _TOGETHER_CHARACTERS:
                        self._write_texts(parts)
                        characters = 0
            else:
                self._write_whole(located, located.row)
                self._tell()
        self._write_texts(parts)
        self._tell(last=True)
        if self._first is None:
            raise UsageError(f"{self._source.path} has no rows: give at least one")
        return self._first[0]

    def _check_kind(self, located: Located) -> None:
        if self._first is None:
            self._first = located.row.kind, located.line
        kind, line = self._first
        if located.row.kind != kind:
            raise UsageError(
                f'{self._source.place(located.line)}: it has "{located.row.kind}" where the first row (at {line}) has '
                f'"{kind}": a file holds rows of one kind, so put the others into a file of their own'
            )

    def _write_texts(self, parts: list[_Part]) -> None:
        """Tokenize and write what is waiting, which is then empty."""
        if not parts:
            return
        try:
            encoded = self._encoder.texts([part.text for part in parts])
        except CheckpointError as error:
            begin, end = parts[0].located.line, parts[-1].located.line
            raise CheckpointError(f"{self._source.place(begin)}, or a row up to {end}: {error}") from error
        for part, ids in zip(parts, encoded, strict=True):
            if part.first:
                self._writer.append(self._encoder.before)
            self._writer.append(ids)
            if part.last:
                self._writer.append(self._encoder.after)
                self._end(part.located)
        parts.clear()
        self._tell()

    def _write_whole(self, located: Located, row: PairRow | ChatRow) -> None:
        try:
            encoded = self._encoder.pair(row) if isinstance(row, PairRow) else self._encoder.conversation(row)
        except (UsageError, CheckpointError) as error:
            raise type(error)(f"{self._source.place(located.line)}: {error}") from error
        self._writer.append(encoded.ids, encoded.loss)
        self._end(located)

    def _end(self, located: Located) -> None:
        if self._writer.tokens == self._writer.began:
            raise UsageError(f"{self._source.place(located.line)}: the tokenizer makes no tokens of it: remove the row")
        self._writer.end_document(line=located.line, offset=located.offset)

    def _tell(self, *, last: bool = False) -> None:
        if not last and self._source.consumed_nbytes - self._told_nbytes < _TELL_NBYTES:
            return
        self._told_nbytes = self._source.consumed_nbytes
        self._progress(
            TokenizingProgress(
                nbytes=self._told_nbytes,
                of_nbytes=self._of_nbytes,
                documents=self._writer.documents,
                tokens=self._writer.tokens,
            )
        )


def _parts(located: Located, row: TextRow) -> Iterator[_Part]:
    """A text's pieces, the first and the last of them known as such."""
    first, held = True, None
    for text in _then_none(cut(row.pieces)):
        if held is not None:
            yield _Part(located=located, text=held, first=first, last=text is None)
            first = False
        held = text


def _then_none(texts: Iterable[str]) -> Iterator[str | None]:
    yield from texts
    yield None
