"""Safetensors files of known contents, whose tensors are filled in any order."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from math import prod
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from ...memory.checkpoint import INDEX, SINGLE
from ...memory.errors import DoesNotFitError
from ...memory.files import disk_error
from ...memory.layout import ITEMSIZE
from ...sizes import format_size

if TYPE_CHECKING:
    from ...runtime.training.exported import ExportedTensor

MOST_NBYTES: Final = 5 * 10**9
"""Of the tensors in one file, unless a single one is larger: as save_pretrained has it."""


class WeightFiles:
    """The weights of a checkpoint on their way to disk: headers are there at once, tensors come by `write`.

    Closing makes the files durable; after an exception it only closes them.
    """

    def __init__(
        self, folder: str, tensors: Sequence[ExportedTensor], *, most_nbytes: int = MOST_NBYTES, single: str = SINGLE
    ) -> None:
        """Make the files.

        Args:
            folder: Empty of weights.
            tensors: Their order is kept from file to file.
            most_nbytes: Of one file.
            single: Name of the file where there is one; another than a checkpoint's is never split.

        Raises:
            DoesNotFitError: the drive has not enough room.
            DiskError: a file cannot be made.
        """
        self._folder = folder
        self._fds: list[int] = []
        self._places: dict[str, tuple[int, int]] = {}
        files = _dealt(tensors, most_nbytes) if single == SINGLE else [list(tensors)]
        self.names = _file_names(len(files)) if single == SINGLE else [single]
        """Of the files, in the order of the tensors."""
        self._check_room(sum(tensor.nbytes for tensor in tensors))
        try:
            for number, held in enumerate(files):
                self._begin(number, held)
            if len(files) > 1:
                self._write_index(files)
        except BaseException:
            self._close()
            raise

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Put bytes into a tensor, `offset` bytes from its start.

        Raises:
            DiskError: the drive failed or is full.
        """
        number, start = self._places[name]
        self._write(number, start + offset, data)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                for number, fd in enumerate(self._fds):
                    try:
                        os.fsync(fd)
                    except OSError as failure:
                        raise disk_error("fsync", self._path(number), 0, 0, failure) from failure
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # nobody reads them soon
        finally:
            self._close()

    def _begin(self, number: int, tensors: Sequence[ExportedTensor]) -> None:
        # Wide elements first, so that each tensor starts on a multiple of its element.
        ordered = sorted(tensors, key=lambda tensor: -ITEMSIZE[tensor.dtype])
        header, offsets = _header(ordered)
        path = self._path(number)
        try:
            self._fds.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            os.ftruncate(self._fds[number], len(header) + sum(tensor.nbytes for tensor in tensors))
        except OSError as error:
            raise disk_error("open", path, 0, 0, error) from error
        self._write(number, 0, memoryview(header))
        self._places.update({name: (number, len(header) + offset) for name, offset in offsets.items()})

    def _write(self, number: int, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._fds[number], data[done:], offset + done)
            except OSError as error:
                raise disk_error("write", self._path(number), offset + done, len(data) - done, error) from error

    def _write_index(self, files: Sequence[Sequence[ExportedTensor]]) -> None:
        every = [tensor for held in files for tensor in held]
        metadata = {
            "total_parameters": sum(prod(tensor.shape) for tensor in every),
            "total_size": sum(tensor.nbytes for tensor in every),
        }
        homes = {tensor.name: name for name, held in zip(self.names, files, strict=True) for tensor in held}
        text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(homes.items()))}, indent=2) + "\n"
        write_durably(os.path.join(self._folder, INDEX), text.encode())

    def _check_room(self, nbytes: int) -> None:
        space = os.statvfs(self._folder)
        free = space.f_bavail * space.f_frsize
        if nbytes > free:
            raise DoesNotFitError(
                f"the weights take {format_size(nbytes)}, and the drive of {os.path.dirname(self._folder)} has "
                f"{format_size(free)} free: free space there, export to another drive, or choose a smaller --dtype",
                tier="disk",
                needed_nbytes=nbytes,
                available_nbytes=free,
            )

    def _path(self, number: int) -> str:
        return os.path.join(self._folder, self.names[number])

    def _close(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


def write_durably(path: str, data: bytes) -> None:
    """Make a small file, and see that it is on the medium.

    Raises:
        DiskError: it cannot be written.
    """
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error("write", path, 0, len(data), error) from error


def _dealt(tensors: Sequence[ExportedTensor], most_nbytes: int) -> list[list[ExportedTensor]]:
    files: list[list[ExportedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if files[-1] and filled + tensor.nbytes > most_nbytes:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += tensor.nbytes
    return files


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def _header(tensors: Sequence[ExportedTensor]) -> tuple[bytes, dict[str, int]]:
    """The start of a file, and where each tensor lies after it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    at = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        offsets[tensor.name] = at
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text, offsets
