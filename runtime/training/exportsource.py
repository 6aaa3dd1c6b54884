"""Where a run's masters lie in its store: its model as it was built, and how its parameters were cut into shards."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from ...memory.errors import UsageError
from ...memory.layout import ITEMSIZE
from ..backing import ModuleBacking
from ..binding import contiguous_stride
from ..dtypes import stored_dtype
from ..experts.layers import fused_experts
from ..partition import cut, streamable
from ..phases import once_per_answer
from ..pretrained import Skeleton, skeleton
from .exported import ExportedTensor
from .preparing import identity_of
from .run import RunState
from .selection import beside_blocks, experts_of
from .shards import Shard, cut_shards
from .trained import Trained, trained_as


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


def of_checkpoint(bones: Skeleton, state: RunState, identity: str) -> tuple[list[Trained], Sequence[Shard]]:
    """What a run of a checkpoint trains, and how it was cut.

    Raises:
        UsageError: it is another model's.
    """
    parameters = {name: p for name, p in streamable(bones.model).items() if name in bones.sources}
    required(state.names, parameters)
    sizes = {name: p.numel() * ITEMSIZE[stored_dtype(bones.dtypes[name])] for name, p in parameters.items()}
    experts = fused_experts(bones.model)
    trained = [
        trained_as(name, parameters[name], contiguous_stride(parameters[name].shape), experts) for name in state.names
    ]
    return trained, _cut_again(bones.model, sizes, trained, state, identity)


def of_module(
    module: nn.Module, state: RunState, identity: str, wanted: torch.dtype | None
) -> tuple[list[ExportedTensor], list[Trained], Sequence[Shard]]:
    """What a run of a module trains, as tensors of a dtype (None: that of each), and how it was cut.

    Raises:
        UsageError: it is another module's.
    """
    parameters = streamable(module)
    required(state.names, parameters)
    backing = ModuleBacking(parameters)
    experts = fused_experts(module)
    # Beside frozen weights parameters are made contiguous before they are trained; in blocks they lie as they lay.
    trained = [
        trained_as(
            name,
            parameters[name],
            contiguous_stride(parameters[name].shape) if state.frozen else backing.stride(name),
            experts,
        )
        for name in state.names
    ]
    shards = _cut_again(module, {name: p.nbytes for name, p in parameters.items()}, trained, state, identity)
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


def _cut_again(
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
        for by_expert in (True, False):  # runs of before are cut without regard to experts
            shards = cut_shards([each.elements for each in trained], blocks, experts=experts_of(trained, by_expert))
            if identity_of(trained, shards, state.mathematics) == identity:
                return shards
    raise refuse_other()


def refuse_other() -> UsageError:
    """That the run belongs to another model."""
    return UsageError(
        "the run belongs to another model: its parameters have other shapes or places. Give the one that it began "
        "with (--source where a checkpoint was moved)"
    )
