"""A file of results that survives being killed: one JSON object per line, appended whole, behind a header.

The header says which prompts and settings the results are of. Whoever goes on with the file drops a torn last line, and
skips the prompts whose lines are there.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from ..memory.errors import DiskError, PenstockError, UsageError

_MARK: Final = "penstock results"
_VERSION: Final = 1


class ResultFile:
    """The file, locked while it is open. Nothing is written before `begin`.

    Args:
        prompts: How many there are.
        digest: What tells these prompts and settings from others.
        resume: Go on with a file that is there.
        force: Write a file that is there anew.

    Raises:
        UsageError: there is a file and neither was asked for; it is of other prompts, or another process writes it.
    """

    def __init__(self, path: Path, *, prompts: int, digest: str, resume: bool, force: bool) -> None:
        self.path = path
        self.finished: set[int] = set()
        """Indices of the prompts whose results are there."""
        self._prompts = prompts
        self._header = {_MARK: _VERSION, "prompts": prompts, "digest": digest}
        self._kept_nbytes = 0
        """What `begin` keeps of the file."""
        self._made = not path.exists()
        self._file = self._open()
        try:
            if not self._made and not (resume or force):
                raise UsageError(f"{path} exists: --resume goes on with it, --force writes it anew")
            if resume:
                self._look()
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Drop what is not to be kept, and write the header where it is not there."""
        try:
            os.ftruncate(self._file, self._kept_nbytes)
        except OSError as error:
            raise DiskError(f"{self.path} cannot be written: {error.strerror}; name another --output") from error
        self._made = False
        if not self._kept_nbytes:
            self.write(self._header)

    def write(self, record: Any) -> None:
        """Append one line, all of it, to the file.

        Raises:
            DiskError: it cannot be written. What was written of the line is dropped when the file is gone on with.
        """
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise DiskError(
                f"{self.path} cannot be written: {error.strerror}; make room and go on with --resume"
            ) from error

    def close(self) -> None:
        """Put the lines on the disk and unlock. A file that was made here and never begun goes again."""
        if self._file < 0:
            return
        file, self._file = self._file, -1
        try:
            if self._made:
                self.path.unlink(missing_ok=True)
            else:
                os.fsync(file)
        finally:
            os.close(file)

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> int:
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(f"--output {self.path} cannot be written: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise UsageError(f"--output {self.path} is no plain file; without --output results go to stdout")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            raise UsageError(
                f"--output {self.path} is being written by another process: wait, or name another"
            ) from error
        except BaseException:
            os.close(file)
            raise
        return file

    def _look(self) -> None:
        """Find out what is there."""
        with open(os.dup(self._file), "rb") as lines:
            lines.seek(0)
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break  # torn
                if number == 1:
                    self._check_header(line)
                else:
                    self.finished.add(self._index(number, line))
                self._kept_nbytes += len(line)
            else:
                return
        if not self._kept_nbytes and not json.dumps(self._header).encode().startswith(line):
            raise UsageError(f"{self.path} is no file of results: name another one by --output")

    def _check_header(self, line: bytes) -> None:
        header = _parsed(line)
        if not isinstance(header, dict) or _MARK not in header:
            raise UsageError(f"{self.path} is no file of results: name another one by --output")
        if header[_MARK] != _VERSION:
            raise UsageError(f"{self.path} was written by another version of penstock: name another one by --output")
        if header != self._header:
            raise UsageError(
                f"{self.path} has results of other prompts or other settings: give those again, name another file by "
                f"--output, or write it anew with --force"
            )

    def _index(self, number: int, line: bytes) -> int:
        record = _parsed(line)
        index = record.get("index") if isinstance(record, dict) else None
        if not isinstance(index, int) or not 0 <= index < self._prompts:
            raise PenstockError(
                f"{self.path}, line {number}: not a result of these prompts; remove the line, or write the file anew "
                f"with --force"
            )
        return index


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
