"""A run's adapters as a folder that `peft.PeftModel.from_pretrained` loads: settings, and weights by PEFT's names."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import nn

from ...memory.store import BlockStore
from ..binding import contiguous_stride
from ..dtypes import parse_dtype, stored_dtype
from .adapters import from_text, peft, without_adapters
from .exported import Export, ExportedTensor, whole_run
from .exportsource import bones_of, refuse_other, required
from .masters import Masters
from .preparing import identity_of
from .run import RunState
from .selection import beside_blocks
from .shards import Shard
from .trained import Trained

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def plan_adapter_export(
    store: BlockStore,
    state: RunState,
    *,
    dtype: str | torch.dtype = "auto",
    source: str | None = None,
    trust_remote_code: bool = False,
) -> Export:
    """What the adapters of the last commit of a run look like as PEFT's folder. Nothing of it is read yet but headers.

    Args:
        store: The run's, open; read-only is enough.
        state: What its last commit says; it began with a checkpoint and `lora=`.
        dtype: Of the weights; "auto" is what the run computed adapters in.
        source: Where the checkpoint is now that the run began with; None for where it was.
        trust_remote_code: Run code that comes with the checkpoint.

    Raises:
        UsageError: the run belongs to another model, or PEFT is missing.
        CheckpointError: the source cannot be used.
    """
    assert state.adapters is not None
    wanted = parse_dtype(dtype)
    bones = bones_of(state, source, state.dtype, trust_remote_code)
    model, trained, shards = with_adapters(bones.model, state, store.identity)
    stored = peft().get_peft_model_state_dict(
        model, state_dict={name: name for name in state.names}, save_embedding_layers=False
    )
    names = {name: called for called, name in stored.items()}
    tensors = [
        ExportedTensor(
            name=names[each.name],
            dtype=stored_dtype(wanted or each.parameter.dtype),
            shape=tuple(each.parameter.shape),
        )
        for each in trained
    ]
    runs = {each.name: whole_run(tensor) for each, tensor in zip(trained, tensors, strict=True)}
    return Export(
        tensors=tensors,
        names="adapter",
        steps=max(state.steps),
        dtype=str(wanted or trained[0].parameter.dtype).removeprefix("torch."),
        source=bones.checkpoint.folder,
        trained=len(trained),
        content=Masters(tensors=tensors, trained=trained, shards=shards, runs=runs),
        files={CONFIG: _settings(state.adapters, source or state.source, model)},
        weights=WEIGHTS,
    )


def with_adapters(model: nn.Module, state: RunState, identity: str) -> tuple[nn.Module, list[Trained], Sequence[Shard]]:
    """A model without weights with a run's adapters, as PEFT makes it; these, and where they lie in the run's store.

    Raises:
        UsageError: the run belongs to another model, or PEFT is missing.
    """
    assert state.adapters is not None
    made: nn.Module = peft().get_peft_model(model, from_text(state.adapters), low_cpu_mem_usage=True)
    parameters = dict(made.named_parameters())
    required(state.names, parameters)
    trained = [
        Trained(name=name, parameter=parameters[name], stride=contiguous_stride(parameters[name].shape))
        for name in state.names
    ]
    shards = beside_blocks(trained)
    if identity_of(trained, shards, state.mathematics) != identity:
        raise refuse_other()
    return made, trained, shards


def _settings(text: str, base: str | None, model: nn.Module) -> str:
    """adapter_config.json as PEFT's `save_pretrained` writes it: for inference, and with the class that it belongs to
    where no task says so."""
    found = json.loads(text)
    found |= {"inference_mode": True, "base_model_name_or_path": base}
    if found.get("task_type") is None:
        kind = type(without_adapters(model))
        found["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return json.dumps(found, indent=2, sort_keys=True)
