"""A run's adapters merged into the checkpoint that it began with: a checkpoint that needs no PEFT.

PEFT's own layers merge, one after the other: each gets its weights and its adapters, is told to `merge`, and gives them
up again. So the bits are those of `merge_and_unload` on a model in memory (with as many threads), whatever the kind of
layer, and memory is that of one layer: its weights, its adapters, and their product in the adapters' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...memory.disk import DiskEngine
from ...memory.errors import UsageError
from ...memory.layout import ITEMSIZE
from ...memory.store import BlockStore
from ..conversion import Converted, Source
from ..dtypes import parse_dtype, stored_dtype
from ..pretrained import Skeleton
from ..repacking import read_tensor
from .adapterexport import with_adapters
from .adapters import peft
from .exported import Export, Run, Sink
from .exportnames import as_named, as_stored
from .exportsource import bones_of
from .masters import MasterReader
from .run import RunState
from .shards import Shard
from .trained import Trained


def plan_merged_export(
    store: BlockStore,
    state: RunState,
    *,
    dtype: str | torch.dtype = "auto",
    source: str | None = None,
    trust_remote_code: bool = False,
) -> Export:
    """What the checkpoint looks like with the adapters of the last commit in it. Nothing of it is read yet but headers.

    Args:
        store: The run's, open; read-only is enough.
        state: What its last commit says; it began with a checkpoint and `lora=`.
        dtype: Of the weights that adapters are merged into, and of the result; "auto" is what the run computed in.
        source: Where the checkpoint is now that the run began with; None for where it was.
        trust_remote_code: Run code that comes with the checkpoint.

    Raises:
        UsageError: the run belongs to another model, PEFT is missing, or some layer cannot be merged by itself.
        CheckpointError: the source cannot be used.
    """
    wanted = parse_dtype(dtype) or state.dtype
    bones = bones_of(state, source, wanted, trust_remote_code)
    known = {id(parameter): name for name, parameter in bones.model.named_parameters()}
    model, trained, shards = with_adapters(bones.model, state, store.identity)
    layers = _layers(model)
    weights = {id(p): known[id(p)] for _, layer in layers for p in layer.get_base_layer().parameters(recurse=False)}
    changed = list(dict.fromkeys(weights.values()))
    plain = bones_of(state, source, wanted, trust_remote_code)  # whose names have no adapters in them
    found, names = as_stored(plain, changed), "checkpoint"
    if found is None:
        names, found = "model", as_named(plain, changed)
    tensors, runs = found
    return Export(
        tensors=tensors,
        names=names,
        steps=max(state.steps),
        dtype=str(wanted).removeprefix("torch."),
        source=plain.checkpoint.folder,
        trained=len(trained),
        merged=len(changed),
        content=Merging(
            model=model, bones=bones, layers=layers, weights=weights, trained=trained, shards=shards, runs=runs
        ),
    )


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers with adapters, in the order in which PEFT merges them.

    Raises:
        UsageError: one is more than a layer with weights of its own.
    """
    kind = peft().tuners.tuners_utils.BaseTunerLayer
    found = [(name, child) for name, child in model.named_modules() if isinstance(child, kind)]
    for name, child in found:
        if hasattr(child, "unload_and_optionally_merge_module"):
            raise UsageError(
                f"{name} is a {type(child.get_base_layer()).__name__}, which PEFT merges in a way of its own: load the "
                "model and the exported adapters in memory, and use merge_and_unload"
            )
    return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Merging:
    """Weights with adapters in them. A `Content`."""

    model: nn.Module
    """With adapters, all without values."""
    bones: Skeleton
    """Whose model it is."""
    layers: Sequence[tuple[str, Any]]
    """Those with adapters, with their names."""
    weights: Mapping[int, str]
    """The names in the checkpoint of what is merged into, by the parameter's identity."""
    trained: Sequence[Trained]
    shards: Sequence[Shard]
    runs: Mapping[str, Sequence[Run]]
    """Of each parameter that is merged into."""

    def write(self, store: BlockStore, sink: Sink) -> None:
        """Merge one layer after the other, and write it.

        Raises:
            CorruptBlockError: a shard is not what was committed, or was written again since.
            DiskError: something cannot be read.
        """
        reader, engine = MasterReader(store, self.trained, self.shards), DiskEngine()
        adapters = {id(each.parameter): each.name for each in self.trained}
        dtypes = {id(each.parameter): each.parameter.dtype for each in self.trained}

        def value(parameter: nn.Parameter) -> torch.Tensor:
            if id(parameter) in adapters:
                return reader.read(adapters[id(parameter)]).to(dtypes[id(parameter)])
            name = self.weights[id(parameter)]
            return _value(engine, self.bones.sources[name], stored_dtype(self.bones.dtypes[name]))

        try:
            for group in self._groups():
                with torch.no_grad():
                    merged = _merge([layer for _, layer in group], value)
                for identity, tensor in merged.items():
                    if identity in self.weights:
                        self._put(sink, self.weights[identity], tensor)
        finally:
            engine.close()

    def _groups(self) -> Iterator[list[tuple[str, Any]]]:
        """Layers one by one; those that share a weight, which is tied, together."""
        left = list(self.layers)
        while left:
            group = [left.pop(0)]
            shared = {id(p) for p in group[0][1].get_base_layer().parameters(recurse=False)}
            for each in left[:]:
                if shared & {id(p) for p in each[1].get_base_layer().parameters(recurse=False)}:
                    left.remove(each)
                    group.append(each)
            yield group

    def _put(self, sink: Sink, name: str, value: torch.Tensor) -> None:
        itemsize = ITEMSIZE[stored_dtype(value.dtype)]
        raw = value.contiguous().view(-1).view(torch.uint8).numpy().data.cast("B")
        for run in self.runs[name]:
            part = raw[run.start * itemsize : (run.start + run.elements) * itemsize]
            sink.write(run.name, run.at * itemsize, part)


def _merge(layers: Sequence[Any], value: Any) -> dict[int, torch.Tensor]:
    """Give layers their values, let PEFT merge them, and take the values away again: what they are then, by the
    identity of the parameters that stood for them."""
    places = [
        (module._parameters, key, parameter)
        for layer in layers
        for module in layer.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]
    real: dict[int, nn.Parameter] = {}
    try:
        for parameters, key, parameter in places:
            if id(parameter) not in real:
                real[id(parameter)] = nn.Parameter(value(parameter), requires_grad=False)
            parameters[key] = real[id(parameter)]
        for layer in layers:
            layer.merge()
            layer.merged_adapters.clear()  # what was merged is about to go
    finally:
        for parameters, key, parameter in places:
            parameters[key] = parameter
    return {identity: each.data for identity, each in real.items()}


def _value(engine: DiskEngine, source: Source, dtype: str) -> torch.Tensor:
    """A weight as the model would have it in memory."""
    if isinstance(source, Converted):
        stored = {key: read_tensor(engine, part) for key, part in source.sources.items()}
        (made,) = source.convert(stored).values()
        return made
    return read_tensor(engine, source, dtype)
