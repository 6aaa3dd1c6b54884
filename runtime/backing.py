"""Where the bytes of a model's parameters come from: a checkpoint's files, or a module that is already built."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Final, Protocol

import torch
from torch import nn

from ..memory.arena import round_up
from ..memory.image import ALIGN, Image, build_image, packed_image, source_skew
from ..memory.layout import ITEMSIZE, FileSpan, TensorSource
from .binding import contiguous_stride
from .dtypes import stored_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """A parameter, or some of its rows."""

    name: str
    rows: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """Its name inside an image."""
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"


_ROW: Final = re.compile(r"(?P<name>.+)\[(?P<first>\d+):\d+\]")
"""The key of a portion that is some rows."""


class Backing(Protocol):
    """Gives blocks their images."""

    preloaded: bool
    """Whether the bytes are in memory now and must be put into arenas or scratch files before the first run."""

    def holds(self, name: str) -> bool:
        """Whether it has the bytes of this parameter."""
        ...

    def dtype(self, name: str) -> str:
        """Element type that the model computes with."""
        ...

    def stride(self, name: str) -> tuple[int, ...]:
        """Strides of a parameter, in elements."""
        ...

    def image(self, portions: Sequence[Portion], *, move: bool) -> Image:
        """How a block of these tensors lies in a slot; `move` as for `build_image`."""
        ...

    def skew(self, portion: Portion) -> int:
        """How far after a 64-byte boundary a resident model has the tensor; kernels may look at it."""
        ...

    def source(self, name: str) -> TensorSource:
        """Where a whole parameter is on disk."""
        ...


class CheckpointBacking:
    """Parameters that are read from a checkpoint as they lie there."""

    preloaded = False

    def __init__(
        self, sources: Mapping[str, TensorSource], dtypes: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._sources = sources
        self._dtypes = dtypes
        self._shapes = shapes

    def holds(self, name: str) -> bool:
        """Whether the checkpoint has this parameter; a model's class may exempt some."""
        return name in self._sources

    def dtype(self, name: str) -> str:
        """Element type that the model computes with."""
        return self._dtypes[name]

    def stride(self, name: str) -> tuple[int, ...]:
        """Row-major, as files are."""
        return contiguous_stride(self._shapes[name])

    def files(self) -> list[str]:
        """What is read, in order of names."""
        return sorted({span.path for source in self._sources.values() for span in source.spans})

    def itemsizes(self) -> list[int]:
        """Bytes of an element of each parameter, as the model computes with it."""
        return [ITEMSIZE[self._dtypes[name]] for name in self._sources]

    def sizes(self) -> list[int]:
        """Bytes of each parameter, in the same order."""
        shapes = (self._shapes[name] for name in self._sources)
        return [prod(shape) * itemsize for shape, itemsize in zip(shapes, self.itemsizes(), strict=True)]

    def image(self, portions: Sequence[Portion], *, move: bool) -> Image:
        """How a block of these tensors lies in a slot."""
        tensors = []
        for portion in portions:
            source = self._sources[portion.name]
            if portion.rows is not None:
                source = source.slice_rows(*portion.rows)
            tensors.append((portion.key, source, self._dtypes[portion.name]))
        return build_image(tensors, move=move)

    def skew(self, portion: Portion) -> int:
        """That of the file, because safetensors maps files; none where the tensor is converted."""
        source = self._sources[portion.name]
        if portion.rows is not None:
            source = source.slice_rows(*portion.rows)
        return source_skew(source, self._dtypes[portion.name])

    def source(self, name: str) -> TensorSource:
        """Where a whole parameter is on disk."""
        return self._sources[name]


class ModuleBacking:
    """Parameters of a module that is already built; what is not kept in memory is written to scratch files once.

    There is one file per drive; blocks take turns.

    """

    preloaded = True

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._strides = {  # now: parameters that have been moved do not say any more how they lay
            name: tuple(parameter.stride()) if dense(parameter) else contiguous_stride(parameter.shape)
            for name, parameter in parameters.items()
        }
        self.paths: list[str] = []
        self._ends: list[int] = []
        self._turn = 0
        self._placed: dict[str, TensorSource] = {}
        self._rows: dict[str, dict[int, FileSpan]] = defaultdict(dict)
        """By parameter and first row, where single rows are that are blocks by themselves (experts)."""

    def holds(self, name: str) -> bool:
        """All of them."""
        return name in self._parameters

    def dtype(self, name: str) -> str:
        """Element type of the parameter."""
        return stored_dtype(self._parameters[name].dtype)

    def stride(self, name: str) -> tuple[int, ...]:
        """Strides as the parameter has them, where they are dense; kernels may choose by them (channels last)."""
        return self._strides[name]

    def image(self, portions: Sequence[Portion], *, move: bool) -> Image:
        """A block of our own making: aligned, in one piece."""
        tensors = []
        for portion in portions:
            shape = tuple(self._parameters[portion.name].shape)
            if portion.rows is not None:
                shape = (portion.rows[1] - portion.rows[0], *shape[1:])
            tensors.append((portion.key, shape, self.dtype(portion.name), self.skew(portion)))
        return packed_image(tensors)

    def skew(self, portion: Portion) -> int:
        """How far after a 64-byte boundary the tensor lies now; kernels may look at it."""
        parameter = self._parameters[portion.name]
        if parameter.device.type != "cpu" or not dense(parameter):
            return 0
        at = parameter.data_ptr()
        if portion.rows is not None:
            at += portion.rows[0] * (parameter.nbytes // parameter.shape[0])
        return at % ALIGN

    def store_in(self, paths: Sequence[str]) -> None:
        """Name the scratch files."""
        self.paths, self._ends = list(paths), [0] * len(paths)

    def place(self, image: Image) -> Image:
        """Give an image its place at the end of a scratch file."""
        (window,) = image.windows
        path, offset = self._take(window.nbytes)
        for key, place in image.places.items():
            rows = _ROW.fullmatch(key)
            if rows is not None:
                span = FileSpan(path=path, offset=offset + place.offset, nbytes=place.nbytes)
                self._rows[rows["name"]][int(rows["first"])] = span
        return replace(image, windows=(replace(window, path=path, file_offset=offset),))

    def place_table(self, name: str) -> FileSpan:
        """Give a whole table a place in a scratch file, page-aligned."""
        parameter = self._parameters[name]
        path, offset = self._take(round_up(parameter.nbytes))
        span = FileSpan(path=path, offset=offset, nbytes=parameter.nbytes)
        self._placed[name] = TensorSource(shape=tuple(parameter.shape), dtype=self.dtype(name), spans=(span,))
        return span

    def _take(self, nbytes: int) -> tuple[str, int]:
        turn, self._turn = self._turn, (self._turn + 1) % len(self.paths)
        offset = self._ends[turn]
        self._ends[turn] += nbytes
        return self.paths[turn], offset

    def source(self, name: str) -> TensorSource:
        """Where a table is in the scratch file, or a parameter that is blocks by row in several."""
        if name in self._placed:
            return self._placed[name]
        parameter, rows = self._parameters[name], self._rows[name]
        spans = tuple(rows[first] for first in sorted(rows))
        return TensorSource(shape=tuple(parameter.shape), dtype=self.dtype(name), spans=spans)

    def value(self, portion: Portion) -> torch.Tensor:
        """The bytes of a tensor, flat, on the CPU, in the order in which `stride` reads them."""
        parameter = self._parameters[portion.name].detach()
        if portion.rows is not None:
            parameter = parameter[portion.rows[0] : portion.rows[1]].contiguous()
        if not dense(parameter):
            parameter = parameter.contiguous()
        flat = torch.as_strided(parameter, (parameter.numel(),), (1,))
        return flat.cpu().view(torch.uint8)


def dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in whatever order."""
    expected = 1
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(pair for pair in pairs if pair[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True
