"""Training data in a parquet file, read through pyarrow where that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ....memory.errors import UsageError
from .rows import KEYS, parse_row
from .sources import Located

_TOGETHER: Final = 256
"""Rows that are in memory at once, beside the column chunks that pyarrow holds."""


class Parquet:
    """A table with the columns `text`, or `prompt` and `response`, or `messages`.

    Raises:
        UsageError: pyarrow is not installed, or the file is not parquet or has no such column.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.consumed_nbytes = 0
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise UsageError(
                f"{path}: reading parquet needs pyarrow, which is not installed: `pip install 'penstock[data]'`, "
                "or convert the file to .jsonl"
            ) from error
        self._pyarrow: Any = pyarrow
        with self._open() as table:
            names = table.schema_arrow.names
        self._columns = [key for key in KEYS if key in names]
        if not set(self._columns) - {"tools"}:
            raise UsageError(
                f"{path} has the columns {', '.join(names[:8]) or '(none)'}: name them text, or prompt and response, "
                "or messages"
            )

    def place(self, line: int) -> str:
        """ "data.parquet, row 7"."""
        return f"{self.path}, row {line}"

    def rows(self) -> Iterator[Located]:
        """One row per row of the table."""
        nbytes = self.path.stat().st_size
        number = 0
        with self._open() as table:
            count = table.metadata.num_rows
            for row in self._values(table):
                number += 1
                self.consumed_nbytes = nbytes * number // max(count, 1)
                try:
                    yield Located(row=parse_row(row), line=number, offset=number - 1)
                except UsageError as error:
                    raise UsageError(f"{self.place(number)}: {error}") from error

    def _open(self) -> Any:
        try:
            return self._pyarrow.parquet.ParquetFile(self.path)
        except (OSError, self._pyarrow.ArrowException) as error:
            raise UsageError(f"{self.path} is no parquet file that can be read ({_one_line(error)})") from error

    def _values(self, table: Any) -> Iterator[dict[str, Any]]:
        batches = table.iter_batches(batch_size=_TOGETHER, columns=self._columns, use_threads=False)
        while True:
            try:
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            except (OSError, ValueError, self._pyarrow.ArrowException) as error:
                raise UsageError(f"{self.path} is damaged ({_one_line(error)}): fetch or make it again") from error
            if batch is None:
                return
            yield from rows


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
