"""Files of training data, read row by row and refused with the place of what is wrong."""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from ....memory.errors import UsageError
from ....memory.files import disk_error
from .rows import Row, TextRow, parse_row

LONGEST_LINE_NBYTES: Final = 256 * 2**20
"""A longer line is no row that anybody means, and would have to be in memory as a whole."""

_CHUNK_NBYTES: Final = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """A row and where it stands."""

    row: Row
    line: int
    """Counted from 1; in a parquet file the row's number."""
    offset: int
    """Where the row begins in the file, in bytes; in a parquet file the row's number from 0."""


class Source(Protocol):
    """A file of rows."""

    path: Path
    consumed_nbytes: int
    """How far `rows` has come in the file, for a progress bar."""

    def rows(self) -> Iterator[Located]:
        """All rows, in order.

        Raises:
            UsageError: a row is none; the message names file and line.
            DiskError: the file cannot be read on.
        """

    def place(self, line: int) -> str:
        """A row's place in words, for messages."""


class JsonLines:
    """One JSON object per line. Empty lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.consumed_nbytes = 0

    def place(self, line: int) -> str:
        """ "data.jsonl, line 7"."""
        return f"{self.path}, line {line}"

    def rows(self) -> Iterator[Located]:
        """One row per line that is not empty."""
        offset = number = 0
        with open_file(self.path) as file:
            while line := file.readline(LONGEST_LINE_NBYTES + 1):
                number += 1
                self.consumed_nbytes = offset + len(line)
                if len(line) > LONGEST_LINE_NBYTES:
                    raise UsageError(
                        f"{self.place(number)}: longer than {LONGEST_LINE_NBYTES >> 20} MiB; write one row per line"
                    )
                if offset == 0:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    try:
                        yield Located(row=_parse_line(line), line=number, offset=offset)
                    except UsageError as error:
                        raise UsageError(f"{self.place(number)}: {error}") from error
                offset = self.consumed_nbytes


class PlainText:
    """A file that is one document."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.consumed_nbytes = 0

    def place(self, line: int) -> str:
        """ "book.txt": its one row is all of it."""
        return str(self.path)

    def rows(self) -> Iterator[Located]:
        """The one row, whose pieces are read when they are asked for."""
        yield Located(row=TextRow(pieces=self._pieces()), line=1, offset=0)

    def _pieces(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        line, empty = 1, True
        with open_file(self.path) as file:
            while True:
                chunk = file.read(_CHUNK_NBYTES)
                try:
                    text = decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    line += error.object[: error.start].count(b"\n")
                    raise UsageError(f"{self.path}, line {line}: not UTF-8 text; convert the file") from error
                line += text.count("\n")
                empty = empty and not text.strip()
                self.consumed_nbytes += len(chunk)
                if text:
                    yield text
                if not chunk:
                    break
        if empty:
            raise UsageError(f"{self.path} is empty: give a file with text in it")


def open_source(path: Path) -> Source:
    """What reads a file, by the end of its name: .jsonl, .txt or .parquet.

    Raises:
        UsageError: it is no plain file that can be read, its name ends otherwise, or what reads it is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".txt", ".parquet"):
        raise UsageError(f"{path}: training data is a .jsonl, .txt or .parquet file, not {suffix or 'one without'!r}")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is no plain file: give a .jsonl, .txt or .parquet file")
    if suffix == ".jsonl":
        return JsonLines(path)
    if suffix == ".txt":
        return PlainText(path)
    from .parquet import Parquet  # it wants a package that few have

    return Parquet(path)


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """A file open for reading bytes.

    Raises:
        UsageError: it cannot be opened.
        DiskError: it cannot be read on.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115  # what goes wrong later is another error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        try:
            yield file
        except OSError as error:
            raise disk_error("read", str(path), file.tell(), _CHUNK_NBYTES, error) from error


def _parse_line(line: bytes) -> Row:
    try:
        value = json.loads(line.decode())
        return parse_row(value)
    except UnicodeDecodeError as error:
        raise UsageError("not UTF-8 text; convert the file") from error
    except RecursionError as error:
        raise UsageError("nested too deeply to be a row; write it flat") from error
    except json.JSONDecodeError as error:
        raise UsageError(
            f"not JSON ({error.msg} at column {error.colno}); write one object per line, such as "
            '{"text": …} or {"prompt": …, "response": …}'
        ) from error
    except UsageError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise UsageError(f"not JSON that can be read ({error}); write such a number as a text") from error
