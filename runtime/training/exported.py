"""A checkpoint that could be written: its tensors, whose names they have, and where their bytes come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from ...memory.checkpoint import SINGLE
from ...memory.layout import ITEMSIZE
from ...memory.store import BlockStore
from ..conversion import Source


class Sink(Protocol):
    """Where a checkpoint is written to."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Put bytes into a tensor, `offset` bytes from its start."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedTensor:
    """A tensor that is to be written."""

    name: str
    dtype: str
    """A key of `memory.layout.ITEMSIZE`."""
    shape: tuple[int, ...]
    copied: Source | None = None
    """What it has where no master is written; None where masters are written everywhere."""

    @property
    def nbytes(self) -> int:
        """As it is written."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Consecutive elements of a parameter, and where they go."""

    start: int
    elements: int
    name: str
    at: int


class Content(Protocol):
    """What a run has made."""

    def write(self, store: BlockStore, sink: Sink) -> None:
        """Write it.

        Raises:
            CorruptBlockError: a shard is not what was committed, or was written again since.
            DiskError: something cannot be read.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """A checkpoint that could be written."""

    tensors: Sequence[ExportedTensor]
    names: str
    """Whose names they have: "checkpoint", "model", or "adapter" where they are PEFT's."""
    steps: int
    """Updates that the commit has seen."""
    dtype: str
    """What config.json should say; "auto" where that is what the source's says."""
    source: str | None
    """Folder of the checkpoint that the run began with; None for a module."""
    trained: int
    """Parameters that the run trains."""
    merged: int = 0
    """Parameters of the checkpoint that adapters are merged into."""
    content: Content
    files: Mapping[str, str] | None = None
    """Texts to be written beside the weights, by file; None where the source's are copied."""
    weights: str = SINGLE
    """File of the weights, where they go into one."""

    def write_masters(self, store: BlockStore, sink: Sink) -> None:
        """Write what the run has made. Tensors with something to be copied must have it by then: it shines through
        where nothing else is written.

        Raises:
            CorruptBlockError: a shard is not what was committed, or was written again since.
            DiskError: one cannot be read.
        """
        self.content.write(store, sink)


def whole_run(tensor: ExportedTensor) -> list[Run]:
    """A parameter that is written as one tensor."""
    return [Run(start=0, elements=prod(tensor.shape), name=tensor.name, at=0)]


def whole_runs(tensors: Sequence[ExportedTensor]) -> dict[str, list[Run]]:
    """Parameters that are written as one tensor each, by the same names."""
    return {tensor.name: whole_run(tensor) for tensor in tensors}
