"""A file of ours on a drive, and requests that keep the drive busy with it through penstock's own engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from ...memory.arena import HostArena
from ...memory.capacity import disk_capacity
from ...memory.disk import DiskEngine
from ...memory.errors import UsageError
from ...memory.image import whole_window
from ...memory.scratch import process_scratch
from ...memory.transfer import Transfer

PIECE: Final = 16 * 2**20
"""What is asked for at a time; the engine cuts it into requests."""
AHEAD: Final = 4
"""Pieces under way, so that the last requests of one never leave the drive idle."""
FILE_NBYTES: Final = 256 * 2**20
LEAST_FILE_NBYTES: Final = 64 * 2**20
"""Over a smaller file, a cache inside the drive would be measured."""


class ProbeFile:
    """A file that is read and written over in a circle.

    Args:
        path: Of the file.
        nbytes: Its size, a multiple of `PIECE`.
    """

    def __init__(self, path: str, nbytes: int) -> None:
        assert nbytes % PIECE == 0, nbytes
        self.path = path
        self.nbytes = nbytes
        self._at = 0

    def advance(self) -> int:
        """Where the next piece begins."""
        at, self._at = self._at, (self._at + PIECE) % self.nbytes
        return at

    def flush(self) -> None:
        """Wait until what was written is on the drive."""
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)


@contextmanager
def probe_file(folder: str | None, arena: HostArena, *, nbytes: int = FILE_NBYTES) -> Iterator[ProbeFile]:
    """A new file with bytes that no drive can squeeze, in a scratch folder; removed at the end.

    Args:
        folder: Named by the user, or None for the scratch folder in the user's cache.
        arena: At least one piece of memory; it is overwritten.
        nbytes: Size of the file; less where less than four times as much is free.

    Raises:
        UsageError: the folder lies in memory, or has too little room.
        PenstockError: the folder cannot be used: another process has it, it cannot be made, or not be written.
    """
    with process_scratch().open(folder) as scratch:
        disk = disk_capacity(scratch.path)
        if disk.in_memory:
            raise UsageError(
                f"{disk.folder} is on {disk.filesystem}, which is memory, not disk: name another with --disk"
            )
        room = min(nbytes, disk.free_nbytes // 4) // PIECE * PIECE
        if room < min(nbytes, LEAST_FILE_NBYTES):
            raise UsageError(
                f"{disk.folder} has {disk.free_nbytes / 2**20:.0f} MiB free, and measuring its drive takes "
                f"{LEAST_FILE_NBYTES * 4 / 2**20:.0f} MiB of free space: free some, or name another folder with --disk"
            )
        file = ProbeFile(str(scratch.path / "probe.bin"), room)
        view = arena.view(0, PIECE)
        noise = os.urandom(2**20)
        for at in range(0, PIECE, len(noise)):
            view[at : at + len(noise)] = noise
        engine = DiskEngine()
        try:
            for at in range(0, room, PIECE):
                engine.write(file.path, at, view).wait()
            file.flush()
        finally:
            engine.close()
        yield file


class DiskLoad:
    """A stream of requests to one drive, with so many pieces under way.

    Args:
        engine: What carries them out.
        file: What they go to.
        arena: Memory for `AHEAD` pieces.
    """

    def __init__(self, engine: DiskEngine, file: ProbeFile, arena: HostArena) -> None:
        assert arena.nbytes >= AHEAD * PIECE, arena.nbytes
        self._engine = engine
        self._file = file
        self._arena = arena

    def read(self, nbytes: int) -> None:
        """Read so many bytes, whole pieces of them."""
        self._run(nbytes, lambda number: self._read(number))

    def write(self, nbytes: int) -> None:
        """Write so many bytes, to the drive for good."""
        self._run(nbytes, lambda number: self._write(number))
        self._file.flush()

    def mix(self, nbytes: int) -> None:
        """Read and write in turns, half the bytes each, all at the same time."""
        self._run(nbytes, lambda number: self._read(number) if number % 2 else self._write(number))
        self._file.flush()

    def read_until(self, stop: Callable[[], bool]) -> None:
        """Read until told to stop; what is under way then is finished."""
        self._run(None, lambda number: self._read(number), stop)

    def _run(
        self, nbytes: int | None, submit: Callable[[int], Transfer], stop: Callable[[], bool] | None = None
    ) -> None:
        pending: list[Transfer] = []
        number = 0
        while (nbytes is None or number * PIECE < nbytes) and not (stop is not None and stop()):
            if len(pending) == AHEAD:
                pending.pop(0).wait()
            pending.append(submit(number))
            number += 1
        for transfer in pending:
            transfer.wait()

    def _read(self, number: int) -> Transfer:
        window = whole_window(self._file.path, self._file.advance(), PIECE)
        return self._engine.read([window], [], self._place(number))

    def _write(self, number: int) -> Transfer:
        return self._engine.write(self._file.path, self._file.advance(), self._place(number))

    def _place(self, number: int) -> memoryview:
        return self._arena.view(number % AHEAD * PIECE, PIECE)
