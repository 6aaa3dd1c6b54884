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

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ...memory.errors import UsageError
from ...memory.store import BlockStore
from ..dtypes import parse_dtype
from .adapterexport import plan_adapter_export
from .exported import Export, Run, whole_runs
from .exportnames import as_named, as_stored
from .exportsource import bones_of, of_checkpoint, of_module
from .masters import Masters
from .mergedexport import plan_merged_export
from .run import decode


def plan_export(
    store: BlockStore,
    *,
    dtype: str | torch.dtype = "auto",
    source: str | None = None,
    module: nn.Module | None = None,
    trust_remote_code: bool = False,
    merged: bool = False,
) -> Export:
    """What the last commit of a run looks like as a checkpoint. Nothing of it is read yet but headers.

    Args:
        store: The run's, open; read-only is enough.
        dtype: Of the weights; "auto" is what the run computed in.
        source: Where the checkpoint is now that the run began with; None for where it was.
        module: Of a run that began with a module: that module as it was built, which says the shapes. Its trained
            parameters are written, by their names, and nothing else.
        trust_remote_code: Run code that comes with the checkpoint.
        merged: Of a run of adapters: the checkpoint with the adapters merged into its weights.

    Raises:
        UsageError: the run belongs to another model, or a module is needed, or there is no such dtype, or there are no
            adapters to merge.
        CheckpointError: the source cannot be used.
    """
    wanted, state = parse_dtype(dtype), decode(store.metadata)
    if module is None and state.adapters is not None and state.source is not None:
        plan = plan_merged_export if merged else plan_adapter_export
        return plan(store, state, dtype=dtype, source=source, trust_remote_code=trust_remote_code)
    if merged:
        raise UsageError(
            "there is nothing to merge: the run trains weights of the model itself"
            if state.adapters is None
            else "adapters can be merged where the run began with a checkpoint; this one began with a module: go on by "
            "penstock.resume(RUN, model=module), and load what model.save_pretrained writes with PEFT"
        )
    if module is not None:
        tensors, trained, shards = of_module(module, state, store.identity, wanted)
        runs: Mapping[str, Sequence[Run]] = whole_runs(tensors)
        names, folder = "model", None
    else:
        bones = bones_of(state, source, state.dtype, trust_remote_code)
        trained, shards = of_checkpoint(bones, state, store.identity)
        shown = bones if wanted is None else bones_of(state, source, wanted, trust_remote_code)
        names, folder = "checkpoint", bones.checkpoint.folder
        found = as_stored(shown, state.names)
        if found is None:
            names, found = "model", as_named(shown, state.names)
        tensors, runs = found
    return Export(
        tensors=tensors,
        names=names,
        steps=max(state.steps),
        dtype=state.dtype if wanted is None else str(wanted).removeprefix("torch."),
        source=folder,
        trained=len(trained),
        content=Masters(tensors=tensors, trained=trained, shards=shards, runs=runs),
    )
