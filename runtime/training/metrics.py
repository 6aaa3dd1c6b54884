"""What is known of each step, and the file that keeps it: one JSON object per line, in the order of the steps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ...memory.errors import DiskError


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One step of a run."""

    step: int
    """Its number, from 1."""
    epoch: float
    """How often every sequence has been given by now, on average."""
    loss: float
    """Mean over the step's loss tokens; not a number where there was none."""
    lr: float
    gradient_norm: float
    """Of all gradients, before clipping."""
    tokens: int
    """Of this step, padding not counted."""
    loss_tokens: int
    """Of this step: those that were predicted."""
    seen_tokens: int
    """Of all steps up to here."""
    seconds: float
    """From the end of the step before to the end of this one, without evaluation and commits."""
    tokens_per_s: float
    computed_s: float
    """Of these seconds, those in which nothing was waited for: no block, no update, no drive."""
    disk_read_nbytes: int
    """In these seconds."""
    disk_written_nbytes: int
    copied_nbytes: int
    """From host memory to a device apart."""
    updated: bool = True
    """False where the step was left out, because a gradient was not finite or nothing was to be learnt."""
    eval_loss: float | None = None
    """Mean over the evaluation's loss tokens, after this step; None where it was not evaluated."""

    def to_json(self) -> dict[str, Any]:
        """As an object. Numbers that are none, which JSON has no word for, are null; what was not evaluated is left
        out, and so is that a step was taken."""
        found = {name: _plain(value) for name, value in asdict(self).items()}
        if self.eval_loss is None:
            del found["eval_loss"]
        if self.updated:
            del found["updated"]
        return found


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """A file of steps, open for more. A context manager.

    Lines of steps that come after the last commit go: these steps will be taken again. So does a torn last line.

    Args:
        path: The file; made where it is missing.
        after: The last step to keep.

    Raises:
        DiskError: it cannot be read or written, or is damaged.
    """

    def __init__(self, path: Path, *, after: int) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._failed(error) from error
        try:
            os.ftruncate(self._file, _kept_nbytes(path, after))
        except OSError as error:
            os.close(self._file)
            raise self._failed(error) from error
        except DiskError:
            os.close(self._file)
            raise

    def write(self, record: StepRecord) -> None:
        """Append one step.

        Raises:
            DiskError: it cannot be written.
        """
        line = (json.dumps(record.to_json()) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise self._failed(error) from error

    def sync(self) -> None:
        """Have all lines survive a power failure: a commit must not know more steps than this file.

        Raises:
            DiskError: the drive failed.
        """
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """No more steps."""
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _failed(self, error: OSError) -> DiskError:
        return DiskError(
            f"{self.path} cannot be written: {error.strerror}; make room, see to the drive, and resume the run"
        )


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The steps of a file, in order, as objects. A torn last line is left out; a file that is missing has none.

    Raises:
        DiskError: it cannot be read.
    """
    try:
        with path.open("rb") as lines:
            for line in lines:
                record = _parsed(line)
                if record is None:
                    return
                yield record
    except FileNotFoundError:
        return
    except OSError as error:
        raise DiskError(f"{path} cannot be read: {error.strerror}; see to the drive") from error


def _kept_nbytes(path: Path, after: int) -> int:
    """How much of a file is of steps up to `after`. These are whole: they were on the disk before the commit was."""
    kept, last = 0, 0
    with path.open("rb") as lines:
        for line in lines:
            record = _parsed(line)
            if record is None and last < after:
                raise DiskError(
                    f"{path} is damaged at offset {kept}: no step is there behind step {last}, and the last commit is "
                    f"of step {after}. The run itself is whole: bring the file back from a copy, or move it away, and "
                    "resume"
                )
            if record is None or record["step"] > after:
                break
            kept += len(line)
            last = record["step"]
    return kept


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line's object; None where the line is torn, or none of ours."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # not JSON, or not UTF-8
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None
