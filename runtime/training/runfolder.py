"""The folder of a fine-tuning run: what lies where, who may write it, and whether there is something to go on with.

states/         masters and optimizer states, with their commits
scratch/        weights that stream; worth nothing after the run
data/           the tokens of the source file
metrics.jsonl   a line per step
loss.svg        the loss over the steps, drawn at the end
tensorboard/    the same figures for TensorBoard, where that is installed
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from ...memory.errors import DiskError, ScratchBusyError, StoreDamagedError, UsageError
from ...memory.filelock import FileLock
from ...memory.store import BlockStore
from ...memory.store.folder import DATA, LABEL, LOCK, MANIFEST, OURS, PREVIOUS
from .run import RunState, decode

logger = logging.getLogger(__name__)
_LOCK: Final = "penstock-run.lock"


class RunFolder:
    """A run's folder, made if it is missing, and this process's own until it is closed. A context manager.

    Args:
        path: The folder. What lies there beside a run's files is left alone.
        resume: Go on with a run that is there.
        force: Take it away and begin anew; tokens stay where they still hold.

    Raises:
        UsageError: a run is there, and neither was asked for; or both were.
        ScratchBusyError: another process has it.
        StoreError: its states are damaged, or of another version.
        DiskError: the folder cannot be made.
    """

    def __init__(self, path: Path, *, resume: bool = False, force: bool = False) -> None:
        if resume and force:
            raise UsageError("to go on with a run and to take it away exclude each other: give one of the two")
        self.path = path
        self._made = not path.exists()
        self._lock: FileLock | None = self._take()
        try:
            if force:
                self._discard()
            self.state: RunState | None = self._committed()
            """What the last commit says; None where there is none."""
            if not resume and (self.state is not None or self._has_steps()):
                raise UsageError(f"{path} holds a run: --resume goes on with it, --force takes it away and begins anew")
        except BaseException:
            self.close()
            raise

    @property
    def data(self) -> Path:
        """Folder of the tokens."""
        return self.path / "data"

    @property
    def metrics(self) -> Path:
        """File of the steps."""
        return self.path / "metrics.jsonl"

    @property
    def chart(self) -> Path:
        """The drawing of the loss."""
        return self.path / "loss.svg"

    @property
    def board(self) -> Path:
        """Folder of TensorBoard's files."""
        return self.path / "tensorboard"

    @property
    def states(self) -> Path:
        """Folder of the block store: that of `RunFolders`."""
        return self.path / "states"

    def state_files(self) -> list[Path]:
        """Where states are, once the run has begun."""
        return [self.states / DATA]

    def close(self) -> None:
        """Let others have it. A folder that was made here and has nothing in it goes again."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()
            if self._made:
                with suppress(OSError):
                    self.path.rmdir()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> FileLock | None:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"cannot make the folder {self.path}: {error.strerror}; name another by --out") from error
        try:
            return FileLock.acquire(self.path / _LOCK)
        except ScratchBusyError as error:
            raise ScratchBusyError(f"{self.path} is another run's: {error}") from error

    def _committed(self) -> RunState | None:
        if not any(os.path.lexists(self.states / name) for name in (MANIFEST, PREVIOUS)):
            if (self.states / LABEL).exists() and self._has_steps():
                raise StoreDamagedError(
                    f"{self.states / MANIFEST} is missing, and steps were taken: it says where their states are. Bring "
                    "it back from a copy, or begin anew with --force"
                )
            return None  # none was made, or its making was cut off
        with BlockStore.open(self.states, readonly=True) as store:
            return decode(store.metadata) if store.committed else None

    def _has_steps(self) -> bool:
        return self.metrics.exists() and self.metrics.stat().st_size > 0

    def forget_steps(self) -> None:
        """Take away what is told of steps that no commit has, since they will all be taken again.

        Raises:
            DiskError: it stays.
        """
        try:
            self.metrics.unlink(missing_ok=True)
        except OSError as error:
            raise DiskError(f"{self.metrics} cannot be removed: {error.strerror}; name another --out") from error

    def _discard(self) -> None:
        """Take away what is known to be a run's, the store's label last: until then it is known as one."""
        try:
            if (self.states / LABEL).exists():
                lock = FileLock.acquire(self.states / LOCK)
                assert lock is not None
                try:
                    for name in sorted(OURS - {LOCK, LABEL}):
                        (self.states / name).unlink(missing_ok=True)
                    (self.states / LABEL).unlink()
                finally:
                    lock.release()
            for file in (self.metrics, self.chart):
                file.unlink(missing_ok=True)
            if self.board.is_dir():
                for file in self.board.glob("events.out.tfevents.*"):
                    file.unlink()
        except OSError as error:
            raise DiskError(f"{error.filename} cannot be removed: {error.strerror}; name another --out") from error
        logger.info("the run in %s was taken away", self.path)
