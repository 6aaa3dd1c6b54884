"""A run's last commit as a plain Hugging Face checkpoint: weights are its masters, rounded; the rest is the source's.

One pass over the store: each shard is read whole and checked, and its elements go to their places in files that are
made beforehand. So it takes the memory of one shard and one piece of output, whatever the model's size.

Names are those of the checkpoint that the run began with. What transformers renames, splits, stacks or concatenates on
loading (the experts of Mixtral) goes back to where each run of bytes came from, by `runtime/symbolic.py`'s account.
Only where it computes (transposes, interleaves), or makes two parameters of one stored tensor, is there no way back:
then all tensors have the model's own names, which transformers loads, too. A name that the source does not store,
because it is tied to another, is not stored; where the source stores both, both get the new values.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...memory.casting import cast
from ...memory.checkpoint import SINGLE
from ...memory.errors import UsageError
from ...memory.layout import ITEMSIZE, TensorSource
from ...memory.safetensors_header import same_bytes
from ...memory.store import BlockStore
from ..backing import ModuleBacking
from ..binding import contiguous_stride
from ..conversion import Converted, Source
from ..dtypes import parse_dtype, stored_dtype
from ..partition import cut, streamable
from ..phases import once_per_answer
from ..pretrained import Skeleton, skeleton
from .preparing import beside_blocks, identity_of
from .run import RunState, decode
from .shards import Piece, Shard, cut_shards
from .trained import Trained


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
    trained: Sequence[Trained]
    shards: Sequence[Shard]
    runs: Mapping[str, Sequence[Run]]
    """Of each trained parameter."""
    files: Mapping[str, str] | None = None
    """Texts to be written beside the weights, by file; None where the source's are copied."""
    weights: str = SINGLE
    """File of the weights, where they go into one."""

    def write_masters(self, store: BlockStore, sink: Sink) -> None:
        """Write what the run has trained. Tensors with something to be copied must have it by then: it shines through
        where no master is written.

        Raises:
            CorruptBlockError: a shard is not what was committed, or was written again since.
            DiskError: one cannot be read.
        """
        writer = _MasterWriter(self, sink)
        for shard in self.shards:
            masters = np.frombuffer(store.read(shard.id), np.float32, count=shard.elements)
            for piece in shard.pieces:
                writer.write(piece, masters[piece.at : piece.at + piece.elements])


def plan_export(
    store: BlockStore,
    *,
    dtype: str | torch.dtype = "auto",
    source: str | None = None,
    module: nn.Module | None = None,
    trust_remote_code: bool = False,
) -> Export:
    """What the last commit of a run looks like as a checkpoint. Nothing of it is read yet but headers.

    Args:
        store: The run's, open; read-only is enough.
        dtype: Of the weights; "auto" is what the run computed in.
        source: Where the checkpoint is now that the run began with; None for where it was.
        module: Of a run that began with a module: that module as it was built, which says the shapes. Its trained
            parameters are written, by their names, and nothing else.
        trust_remote_code: Run code that comes with the checkpoint.

    Raises:
        UsageError: the run belongs to another model, or a module is needed, or there is no such dtype.
        CheckpointError: the source cannot be used.
    """
    wanted, state = parse_dtype(dtype), decode(store.metadata)
    if module is None and state.adapters is not None and state.source is not None:
        from .adapterexport import plan_adapter_export  # which is built on this file

        return plan_adapter_export(store, state, dtype=dtype, source=source, trust_remote_code=trust_remote_code)
    if module is not None:
        tensors, trained, shards = _of_module(module, state, store.identity, wanted)
        runs: Mapping[str, Sequence[Run]] = _whole_runs(tensors)
        names, folder = "model", None
    else:
        bones = bones_of(state, source, state.dtype, trust_remote_code)
        trained, shards = _of_checkpoint(bones, state, store.identity)
        shown = bones if wanted is None else bones_of(state, source, wanted, trust_remote_code)
        names, folder = "checkpoint", bones.checkpoint.folder
        found = _as_stored(shown, state.names)
        if found is None:
            names, found = "model", _as_named(shown, state.names)
        tensors, runs = found
    return Export(
        tensors=tensors,
        names=names,
        steps=max(state.steps),
        dtype=state.dtype if wanted is None else str(wanted).removeprefix("torch."),
        source=folder,
        trained=trained,
        shards=shards,
        runs=runs,
    )


# --- where masters lie in the store -----------------------------------------------------------------------------------


def bones_of(state: RunState, source: str | None, dtype: str | torch.dtype, trust_remote_code: bool) -> Skeleton:
    """The model that the run began with.

    Raises:
        UsageError: it began with a module.
        CheckpointError: the checkpoint cannot be used.
    """
    path = source or state.source
    if path is None:
        raise UsageError(
            "the run began with a module, and its commits do not say what shapes parameters have: build the module, "
            "go on by penstock.resume(RUN, model=module), and save what model.state_dict() gives (of adapters, "
            "model.save_pretrained writes them)"
        )
    return skeleton(path, dtype=dtype, trust_remote_code=trust_remote_code)


def _of_checkpoint(bones: Skeleton, state: RunState, identity: str) -> tuple[list[Trained], Sequence[Shard]]:
    parameters = {name: p for name, p in streamable(bones.model).items() if name in bones.sources}
    required(state.names, parameters)
    sizes = {name: p.numel() * ITEMSIZE[stored_dtype(bones.dtypes[name])] for name, p in parameters.items()}
    trained = [
        Trained(name=name, parameter=parameters[name], stride=contiguous_stride(parameters[name].shape))
        for name in state.names
    ]
    return trained, _shards(bones.model, sizes, trained, state, identity)


def _of_module(
    module: nn.Module, state: RunState, identity: str, wanted: torch.dtype | None
) -> tuple[list[ExportedTensor], list[Trained], Sequence[Shard]]:
    parameters = streamable(module)
    required(state.names, parameters)
    backing = ModuleBacking(parameters)
    trained = [Trained(name=name, parameter=parameters[name], stride=backing.stride(name)) for name in state.names]
    shards = _shards(module, {name: p.nbytes for name, p in parameters.items()}, trained, state, identity)
    tensors = [
        ExportedTensor(
            name=each.name,
            dtype=stored_dtype(wanted or each.parameter.dtype),
            shape=tuple(each.parameter.shape),
        )
        for each in trained
    ]
    return tensors, trained, shards


def required(names: Sequence[str], parameters: Collection[str]) -> None:
    """See that a model has what a run trains.

    Raises:
        UsageError: it is another model.
    """
    missing = [name for name in names if name not in parameters]
    if missing:
        raise UsageError(
            f"the run trains {len(names)} parameters; {len(missing)} are not in this model: {missing[0]}. "
            "Give the one that it began with (--source where a checkpoint was moved)"
        )


def _shards(
    model: nn.Module, sizes: Mapping[str, int], trained: Sequence[Trained], state: RunState, identity: str
) -> Sequence[Shard]:
    """How the run cut its parameters: by blocks of weights, whose size its commits hold."""
    if state.frozen:
        shards = beside_blocks(trained)
        if identity_of(trained, shards, state.mathematics) == identity:
            return shards
    elif state.limit_nbytes is not None:
        number = {each.name: index for index, each in enumerate(trained)}
        partition = cut(model, sizes, limit=state.limit_nbytes, tables=set(), apart=once_per_answer(model))
        groups = [partition.small.names, *(group.names for group in partition.groups)]
        blocks = {block: [number[name] for name in names if name in number] for block, names in enumerate(groups)}
        shards = cut_shards([each.elements for each in trained], blocks)
        if identity_of(trained, shards, state.mathematics) == identity:
            return shards
    raise refuse_other()


def refuse_other() -> UsageError:
    """That the run belongs to another model."""
    return UsageError(
        "the run belongs to another model: its parameters have other shapes or places. Give the one that it began "
        "with (--source where a checkpoint was moved)"
    )


# --- what goes where --------------------------------------------------------------------------------------------------

_Drafted = tuple[list[ExportedTensor], Mapping[str, Sequence[Run]]]


def whole_run(tensor: ExportedTensor) -> list[Run]:
    """A parameter that is written as one tensor."""
    return [Run(start=0, elements=prod(tensor.shape), name=tensor.name, at=0)]


def _whole_runs(tensors: Sequence[ExportedTensor]) -> dict[str, list[Run]]:
    return {tensor.name: whole_run(tensor) for tensor in tensors}


def _as_named(bones: Skeleton, names: Sequence[str]) -> _Drafted:
    """By the model's own names."""
    trained = set(names)
    tensors = [
        ExportedTensor(
            name=name,
            dtype=stored_dtype(bones.dtypes[name]),
            shape=tuple(bones.model.get_parameter_or_buffer(name).shape),
            copied=None if name in trained else source,
        )
        for name, source in bones.sources.items()
    ]
    return tensors, _whole_runs([tensor for tensor in tensors if tensor.name in trained])


def _as_stored(bones: Skeleton, names: Sequence[str]) -> _Drafted | None:
    """By the names of the checkpoint; None where a trained parameter cannot be taken apart again."""
    stored, trained = bones.checkpoint.tensors, set(names)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    used: Counter[str] = Counter()
    filled: Counter[str] = Counter()
    dtypes: dict[str, set[str]] = {}
    places = _Places(stored)
    for name, source in bones.sources.items():
        if isinstance(source, Converted) and name in trained:
            return None
        parts = list(source.sources.values()) if isinstance(source, Converted) else [source]
        for run in (run for part in parts for run in places.runs(part)):
            used[run.name] += run.elements
            if isinstance(source, TensorSource):
                dtypes.setdefault(run.name, set()).add(stored_dtype(bones.dtypes[name]))
            if name in trained:
                runs[name].append(run)
                filled[run.name] += run.elements
    for name, alias in _stored_ties(bones, used):
        dtypes[alias] = {stored_dtype(bones.dtypes[name])}
        if name in trained:
            elements = prod(stored[alias].shape)
            runs[name].append(Run(start=0, elements=elements, name=alias, at=0))
            filled[alias] += elements
    if any(used[name] > prod(stored[name].shape) for name in used) or any(len(kinds) > 1 for kinds in dtypes.values()):
        return None
    tensors = [
        ExportedTensor(
            name=name,
            dtype=next(iter(dtypes.get(name, {source.dtype}))),
            shape=source.shape,
            copied=None if filled[name] == prod(source.shape) else source,
        )
        for name, source in stored.items()
    ]
    return tensors, runs


def _stored_ties(bones: Skeleton, used: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Tied parameters that the checkpoint stores once more, and by what name."""
    known: dict[int, list[str]] = {}
    for name, parameter in bones.model.named_parameters(remove_duplicate=False):
        known.setdefault(id(parameter), []).append(name)
    tied = [names[0] for names in known.values() if len(names) > 1]
    spare = {name: source for name, source in bones.checkpoint.tensors.items() if source.nbytes and not used[name]}
    for alias, other in spare.items():
        for name in tied:
            one = bones.sources.get(name)
            if not isinstance(one, TensorSource) or (one.shape, one.dtype) != (other.shape, other.dtype):
                continue
            if same_bytes(one.spans, other.spans):
                yield name, alias
                break


class _Places:
    """Which stored tensor has the bytes at a place of a file."""

    def __init__(self, stored: Mapping[str, TensorSource]) -> None:
        self._sorted: dict[str, list[tuple[int, int, str]]] = {}
        for name, source in stored.items():
            for span in source.spans:
                self._sorted.setdefault(span.path, []).append((span.offset, span.offset + span.nbytes, name))
        for tensors in self._sorted.values():
            tensors.sort()

    def runs(self, source: TensorSource) -> Iterator[Run]:
        """The elements of a source, by the stored tensors that they lie in."""
        size, start = ITEMSIZE[source.dtype], 0
        for span in source.spans:
            tensors, at = self._sorted[span.path], span.offset
            while at < span.offset + span.nbytes:
                begin, end, name = tensors[bisect.bisect_right(tensors, at, key=lambda each: each[0]) - 1]
                nbytes = min(end, span.offset + span.nbytes) - at
                assert nbytes > 0, (name, span)
                yield Run(start=start, elements=nbytes // size, name=name, at=(at - begin) // size)
                start += nbytes // size
                at += nbytes


# --- bytes ------------------------------------------------------------------------------------------------------------


class _MasterWriter:
    """Takes the masters of one parameter after another, in order, and writes them where they belong."""

    def __init__(self, export: Export, sink: Sink) -> None:
        self._export = export
        self._sink = sink
        self._dtypes = {tensor.name: tensor.dtype for tensor in export.tensors}
        self._whole: NDArray[np.float32] | None = None

    def write(self, piece: Piece, masters: NDArray[np.float32]) -> None:
        """Some elements of a parameter, as they lie in memory."""
        each = self._export.trained[piece.parameter]
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
        for run in self._export.runs[name]:
            low, high = max(start, run.start), min(stop, run.start + run.elements)
            if low < high:
                dtype = self._dtypes[run.name]
                data = masters[low - start : high - start].data.cast("B")
                out = memoryview(bytearray((high - low) * ITEMSIZE[dtype]))
                cast(data, out, "F32", dtype)
                self._sink.write(run.name, (run.at + low - run.start) * ITEMSIZE[dtype], out)
