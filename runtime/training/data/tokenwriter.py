"""Writes a file of tokens, document by document, and publishes it as a whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from ....memory.errors import DiskError
from ....memory.filelock import FileLock
from ....memory.files import disk_error
from .encoding import Flags, Ids
from .tokenfile import ALIGNMENT, DOCUMENT, HEADER, MAGIC

_COPY_NBYTES: Final = 2**20


class TokenWriter:
    """Writes beside `path`, and renames there in `finish`. A context manager; left before `finish`, it leaves nothing.

    Args:
        path: The file to make or to replace. Its folder exists.
        vocabulary: All ids are below this; up to 65536 they take two bytes, else four.

    Raises:
        ScratchBusyError: another process writes this file.
        DiskError: it cannot be made.
    """

    def __init__(self, path: Path, *, vocabulary: int) -> None:
        self.path = path
        self.documents = 0
        self.tokens = 0
        self._dtype = np.dtype("<u2") if vocabulary <= 2**16 else np.dtype("<u4")
        self._largest = -1
        self.began = 0
        """Where the document at hand begins, in tokens."""
        self._learnt = 0
        self._flagged: bool | None = None
        self._digest = hashlib.blake2b(digest_size=16)
        self._crc32 = {"tokens": 0, "loss": 0, "rows": 0}
        """Of each section."""
        self._partial = path.with_name(f"{path.name}.partial")  # one name, so that a killed run's is overwritten
        self._lock: FileLock | None = FileLock.acquire(path.with_name(f"{path.name}.lock"))
        self._files = ExitStack()
        try:
            self._main = self._files.enter_context(open(self._partial, "wb"))  # noqa: SIM115  # closed in `_close`
            # Sections whose place is known only at the end; nameless, so that nobody has to remove them.
            self._loss = self._files.enter_context(tempfile.TemporaryFile(dir=path.parent))  # noqa: SIM115
            self._rows = self._files.enter_context(tempfile.TemporaryFile(dir=path.parent))  # noqa: SIM115
            self._main.write(bytes(ALIGNMENT))
        except OSError as error:
            self._close()
            raise self._failed(error) from error

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def append(self, ids: Ids, loss: Flags | None = None) -> None:
        """Some more tokens of the document at hand. All of a file's come with flags, or none.

        Raises:
            DiskError: they cannot be written.
        """
        assert self._flagged in (None, loss is not None)
        assert loss is None or len(loss) == len(ids)
        self._flagged = loss is not None
        if not len(ids):
            return
        largest = int(ids.max())
        assert largest <= np.iinfo(self._dtype).max
        self._largest = max(self._largest, largest)
        self._write("tokens", self._main, self._digested(ids.astype(self._dtype)))
        if loss is not None:
            self._write("loss", self._loss, self._digested(loss.astype(np.uint8)))
        self._learnt += len(ids) if loss is None else int(loss.sum())
        self.tokens += len(ids)

    def end_document(self, *, line: int, offset: int) -> None:
        """End the document at hand, which has tokens.

        Args:
            line: The source's line, counted from 1.
            offset: Where the row begins in the source, in bytes.

        Raises:
            DiskError: it cannot be written.
        """
        assert self.tokens > self.began
        self._digested(np.array(self.tokens, "<i8"))
        row = np.array([(self.tokens, self._learnt, line, offset)], DOCUMENT).tobytes()
        self._write("rows", self._rows, row)
        self.began, self._learnt = self.tokens, 0
        self.documents += 1

    def finish(self, made_of: Mapping[str, Any]) -> None:
        """Put everything on the disk and give the file its name.

        Args:
            made_of: What the tokens were made of; JSON.

        Raises:
            DiskError: it cannot be written; what was under the name before is left as it is.
        """
        assert self.began == self.tokens
        try:
            sections = {"tokens": (ALIGNMENT, self._main.tell() - ALIGNMENT)}
            sections["loss"] = self._copy(self._loss)
            sections["rows"] = self._copy(self._rows)
            footer = {
                "made_of": made_of,
                "digest": self._digest.hexdigest(),
                "itemsize": self._dtype.itemsize,
                "largest": self._largest,
                "flagged": bool(self._flagged),
                "sections": sections,
                "crc32": self._crc32,
            }
            text = json.dumps(footer).encode()
            offset = self._main.tell()
            self._main.write(text)
            self._main.seek(0)
            self._main.write(HEADER.pack(MAGIC, offset, len(text), zlib.crc32(text)))
            self._main.flush()
            os.fsync(self._main.fileno())
            os.replace(self._partial, self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error) from error

    def _digested(self, values: NDArray[Any]) -> bytes:
        data = values.tobytes()
        self._digest.update(data)
        return data

    def _write(self, section: str, file: IO[bytes], data: bytes) -> None:
        self._crc32[section] = zlib.crc32(data, self._crc32[section])
        try:
            file.write(data)
        except OSError as error:
            raise self._failed(error, len(data)) from error

    def _copy(self, section: IO[bytes]) -> tuple[int, int]:
        """Append a section at the next aligned place; returns where it lies and its size, in bytes."""
        self._main.write(bytes(-self._main.tell() % ALIGNMENT))
        offset = self._main.tell()
        section.seek(0)
        shutil.copyfileobj(section, self._main, _COPY_NBYTES)
        return offset, self._main.tell() - offset

    def _close(self) -> None:
        """Leave nothing behind but what was published. What a full disk refused once more is of no use now."""
        try:
            with suppress(OSError):
                self._files.close()
            self._partial.unlink(missing_ok=True)
        finally:
            lock, self._lock = self._lock, None
            if lock is not None:
                lock.release()

    def _failed(self, error: OSError, nbytes: int = 0) -> DiskError:
        offset = ALIGNMENT + self.tokens * self._dtype.itemsize
        return disk_error("write", str(self._partial), offset, nbytes, error)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
