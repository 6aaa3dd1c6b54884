"""Weights on their way out: `state_dict` of a streamed model, without bringing the model into memory.

A value that lies in a file as it is needed is a memory map of that file: pages come and go with the page cache, which
is not this process's memory. A value that does not (another dtype, several spans) is written to an unnamed file first.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..memory.errors import UsageError
from ..memory.image import Bounce, Window, bounces_of
from ..memory.layout import ITEMSIZE, TensorSource
from .backing import Backing, CheckpointBacking
from .dtypes import torch_dtype

if TYPE_CHECKING:
    from .build import Machinery

_LOAD_REMEDY = (
    "load_state_dict cannot change a streamed model: its weights are read from their files. Load the other checkpoint "
    "with penstock.load, or call penstock.offload after load_state_dict"
)


def map_source(source: TensorSource, dtype: str, engine_read: Any, folder: str) -> torch.Tensor:
    """A tensor over a file. `engine_read(bounces, into)` fills memory with what must be converted."""
    if source.nbytes == 0:
        return torch.empty(source.shape, dtype=torch_dtype(dtype))
    if len(source.spans) == 1 and source.dtype == dtype and source.spans[0].offset % ITEMSIZE[dtype] == 0:
        span = source.spans[0]
        with open(span.path, "rb") as file:
            return _mapped(file.fileno(), span.offset, source, dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        nbytes = source.nbytes // ITEMSIZE[source.dtype] * ITEMSIZE[dtype]
        os.ftruncate(file.fileno(), nbytes)
        with mmap.mmap(file.fileno(), nbytes) as target:
            view = memoryview(target)
            engine_read(bounces_of(source, dtype), view)
            view.release()
        return _mapped(file.fileno(), 0, source, dtype)


def _mapped(fd: int, offset: int, source: TensorSource, dtype: str) -> torch.Tensor:
    nbytes = source.nbytes // ITEMSIZE[source.dtype] * ITEMSIZE[dtype]
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(fd, offset - start + nbytes, flags=mmap.MAP_PRIVATE, offset=start)
    return (
        torch.frombuffer(pages, dtype=torch_dtype(dtype), offset=offset - start, count=nbytes // ITEMSIZE[dtype])
    ).view(source.shape)


class Exporter:
    """Gives `state_dict` real values."""

    def __init__(self, machinery: Machinery, backing: Backing, folder: str) -> None:
        self._machinery = machinery
        self._backing = backing
        self._folder = folder
        self._made: weakref.WeakValueDictionary[object, torch.Tensor] = weakref.WeakValueDictionary()

    def install(self, module: nn.Module) -> None:
        """Hook every module that owns a streamed parameter."""
        streamed = {id(bound.parameter) for b in self._machinery.bindings.values() for bound in b.tensors}
        streamed |= set(self._machinery.tables)
        for child in module.modules():
            if any(id(parameter) in streamed for parameter in child._parameters.values()):
                child._register_state_dict_hook(self._replace)  # type: ignore[no-untyped-call]
                child.register_load_state_dict_pre_hook(_refuse_load)  # type: ignore[no-untyped-call]

    def _replace(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None and prefix + name in state:
                value = self.value(parameter)
                if value is not None:
                    state[prefix + name] = value

    def value(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The values of a streamed parameter; None for one that is not streamed."""
        key = (id(parameter), self._where(parameter))
        made = self._made.get(key)
        if made is None:
            made = self._value(parameter)
            if made is not None:
                self._made[key] = made
        return made

    def _where(self, parameter: nn.Parameter) -> tuple[Window, ...]:
        """Where its block is read from: somewhere else once training has changed it."""
        for binding in self._machinery.bindings.values():
            if any(bound.parameter is parameter for bound in binding.tensors):
                return self._machinery.images[binding.block].windows
        return ()

    def _value(self, parameter: nn.Parameter) -> torch.Tensor | None:
        machinery = self._machinery
        if id(parameter) in machinery.tables:
            return self._map(machinery.tables[id(parameter)].name, parameter)
        for binding in machinery.bindings.values():
            for index, bound in enumerate(binding.tensors):
                if bound.parameter is parameter:
                    if isinstance(self._backing, CheckpointBacking) and not self._may_differ(binding.block):
                        return self._map(bound.name, parameter)
                    return self._resident(binding.block, index)
        return None

    def _may_differ(self, block: int) -> bool:
        """Whether training may have changed a block since it was read from the checkpoint."""
        machinery = self._machinery
        home = machinery.front if machinery.back is None else machinery.back
        unchanged = next(draft.image for draft in machinery.layout.blocks if draft.id == block)
        return machinery.trains and (block in home.permanent or machinery.images[block] is not unchanged)

    def _map(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        def read(bounces: list[Bounce], into: memoryview) -> None:
            self._machinery.engine.read([], bounces, into).wait()

        return map_source(self._backing.source(name), self._backing.dtype(name), read, self._folder)

    def _resident(self, block: int, index: int) -> torch.Tensor:
        """A parameter of an offloaded module: a view where its block is resident, else a map of the scratch file."""
        machinery = self._machinery
        binding = machinery.bindings[block]
        bound = binding.tensors[index]
        if block in machinery.front.permanent:
            lease = machinery.executor.acquire(block, observed=False)
            try:
                machinery.device.compute_waits(lease.residence.event)
                return binding.views(machinery.session.arena, lease.residence.slot)[index].detach()
            finally:
                machinery.executor.release(lease, machinery.device.computed())
        draft = next(b for b in machinery.layout.blocks if b.id == block)
        place = draft.image.places[draft.portions[index].key]
        if machinery.back is not None and block in machinery.back.permanent:
            machinery.executor.release(machinery.executor.acquire(block, observed=False))  # it is there from now on
            flat = torch.frombuffer(
                machinery.host.view(machinery.back.permanent[block].offset + place.offset, place.nbytes),
                dtype=bound.parameter.dtype,
            )
            return flat.as_strided(place.shape, bound.stride)
        (window,) = machinery.images[block].windows
        with open(window.path, "rb") as file:
            offset = window.file_offset + place.offset
            start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            pages = mmap.mmap(file.fileno(), offset - start + place.nbytes, flags=mmap.MAP_PRIVATE, offset=start)
        flat = torch.frombuffer(pages, dtype=torch.uint8, offset=offset - start, count=place.nbytes)
        return flat.view(bound.parameter.dtype).as_strided(place.shape, bound.stride)


def _refuse_load(module: nn.Module, *args: object) -> None:
    raise UsageError(_LOAD_REMEDY)
