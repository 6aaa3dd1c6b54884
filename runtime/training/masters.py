"""A run's masters on their way out of its store: written as tensors of a checkpoint, or read one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ...memory.casting import cast
from ...memory.layout import ITEMSIZE
from ...memory.store import BlockStore
from ..binding import contiguous_stride
from .exported import ExportedTensor, Run, Sink
from .shards import Piece, Shard
from .trained import Trained


@dataclass(frozen=True, kw_only=True, slots=True)
class Masters:
    """What a run has trained, rounded. A `Content`."""

    tensors: Sequence[ExportedTensor]
    trained: Sequence[Trained]
    shards: Sequence[Shard]
    runs: Mapping[str, Sequence[Run]]
    """Of each trained parameter."""

    def write(self, store: BlockStore, sink: Sink) -> None:
        """Write it, in one pass over the store.

        Raises:
            CorruptBlockError: a shard is not what was committed, or was written again since.
            DiskError: one cannot be read.
        """
        writer = _Writer(self, sink)
        for shard in self.shards:
            masters = _read(store, shard)
            for piece in shard.pieces:
                writer.write(piece, masters[piece.at : piece.at + piece.elements])


class MasterReader:
    """Reads masters one by one, in whatever order; those of neighbours come at little cost."""

    def __init__(self, store: BlockStore, trained: Sequence[Trained], shards: Sequence[Shard]) -> None:
        self._store = store
        self._trained = {each.name: each for each in trained}
        self._places: dict[str, list[tuple[Shard, Piece]]] = {each.name: [] for each in trained}
        for shard in shards:
            for piece in shard.pieces:
                self._places[trained[piece.parameter].name].append((shard, piece))
        self._last: tuple[Shard, NDArray[np.float32]] | None = None

    def read(self, name: str) -> torch.Tensor:
        """The masters of a parameter that lies in row-major order: fp32, in its shape.

        Raises:
            CorruptBlockError: a shard is not what was committed, or was written again since.
            DiskError: one cannot be read.
        """
        each = self._trained[name]
        assert each.stride == contiguous_stride(tuple(each.parameter.shape)), name
        found = torch.empty(each.elements)
        for shard, piece in self._places[name]:
            if self._last is None or self._last[0] is not shard:
                self._last = shard, _read(self._store, shard)
            found[piece.start : piece.stop] = torch.from_numpy(self._last[1][piece.at : piece.at + piece.elements])
        return found.view(each.parameter.shape)


def _read(store: BlockStore, shard: Shard) -> NDArray[np.float32]:
    return np.frombuffer(bytearray(store.read(shard.id)), np.float32, count=shard.elements)


class _Writer:
    """Takes the masters of one parameter after another, in order, and writes them where they belong."""

    def __init__(self, masters: Masters, sink: Sink) -> None:
        self._masters = masters
        self._sink = sink
        self._dtypes = {tensor.name: tensor.dtype for tensor in masters.tensors}
        self._whole: NDArray[np.float32] | None = None

    def write(self, piece: Piece, masters: NDArray[np.float32]) -> None:
        """Some elements of a parameter, as they lie in memory."""
        each = self._masters.trained[piece.parameter]
        shape = tuple(each.parameter.shape)
        if each.stride == contiguous_stride(shape):
            self._write(each.name, piece.start, masters)
            return
        # Its elements are in another order in memory than in files (channels last): it is put together first.
        if piece.start == 0:
            self._whole = np.empty(each.elements, np.float32)
        assert self._whole is not None, each.name
        self._whole[piece.start : piece.stop] = masters
        if piece.stop == each.elements:
            strides = [4 * stride for stride in each.stride]
            ordered = np.lib.stride_tricks.as_strided(self._whole, shape, strides)
            self._write(each.name, 0, np.ascontiguousarray(ordered).reshape(-1))
            self._whole = None

    def _write(self, name: str, start: int, masters: NDArray[np.float32]) -> None:
        stop = start + len(masters)
        for run in self._masters.runs[name]:
            low, high = max(start, run.start), min(stop, run.start + run.elements)
            if low < high:
                dtype = self._dtypes[run.name]
                data = masters[low - start : high - start].data.cast("B")
                out = memoryview(bytearray((high - low) * ITEMSIZE[dtype]))
                cast(data, out, "F32", dtype)
                self._sink.write(run.name, (run.at + low - run.start) * ITEMSIZE[dtype], out)
