"""The public functions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .budget import parse_budget
from .caches import link_cache
from .devices import open_device
from .memory.errors import UsageError
from .runtime.devices.base import Device
from .runtime.explain import Explanation
from .runtime.handle import Handle
from .runtime.loading import load as _load
from .runtime.offloading import offload as _offload
from .runtime.tiers import Wanted

Folders = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
MaxMemory = str | Mapping[str, int | str]


def load(
    path: str | os.PathLike[str],
    *,
    max_memory: MaxMemory = "auto",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    disk: Folders | None = None,
    context: int | None = None,
    batch: int | None = None,
    exact: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Load a Hugging Face checkpoint that may be larger than memory, without ever materialising it.

    Returns the transformers model that its config names, in eval mode, with `requires_grad=False` as long as it is
    streamed; `generate()` and the forward are transformers' own. Weights are read from the original safetensors files
    as they are needed; what fits the budget stays. Answers are bit-identical to the resident model's: nothing splits
    work over processors yet, so every run is what `exact=True` asks for.

    Args:
        path: A folder, or a Hub id.
        max_memory: "auto", or budgets by tier ("host", "device", "disk"): bytes or sizes such as "3GiB". With
            `device="cpu"`, `host` is the one that counts.
        device: "auto", "cpu", "cuda", "cuda:N", or "emulated:h2d=1GiB/s,…".
        dtype: "auto" (as the config says), or what to convert to on the way.
        disk: Folder for scratch files, where any are needed, or a list of folders on several drives; default in the
            user's cache.
        context: Tokens per sequence to leave room for, in automatic budgets.
        batch: Sequences to leave room for, likewise.
        exact: Forbid whatever gives results that are only equal to rounding. Met by every plan there is so far.
        trust_remote_code: Run code that comes with the checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or disagrees with its config.
        DoesNotFitError: the budget is too small even for streaming; nothing was loaded.
        UsageError: an argument has no meaning.
    """
    wanted, folders = _wanted(max_memory), _folders(disk)  # before a device is opened, which starts threads
    return _load(
        path,
        wanted=wanted,
        device=open_device(device),
        dtype=dtype,
        disk=folders,
        context=context,
        batch=batch,
        trust_remote_code=trust_remote_code,
        cache=link_cache(),
    )


def offload(
    module: nn.Module,
    *,
    max_memory: MaxMemory = "auto",
    device: str | torch.device = "auto",
    disk: Folders | None = None,
    context: int | None = None,
    batch: int | None = None,
) -> Any:
    """Make a module that is already built run within a budget, in place. Any module: vision, diffusion, audio.

    Its weights move to arenas and, where those are too small, to a scratch file; the originals are freed. Gradients
    with respect to inputs are right; training the weights is what `penstock.prepare` is for.

    Args: as for `load`. Returns the module.

    Raises:
        DoesNotFitError: the budget is too small even for streaming; the module is untouched.
        DiskError: the scratch file cannot be written; the module is untouched.
        UsageError: an argument has no meaning, or a parameter has no values yet.
    """
    wanted, folders = _wanted(max_memory), _folders(disk)
    return _offload(
        module,
        wanted=wanted,
        device=open_device(device),
        disk=folders,
        context=context,
        batch=batch,
        cache=link_cache(),
    )


def close(model: nn.Module) -> None:
    """Free everything that a streamed model holds: memory, threads, scratch files. It cannot run afterwards."""
    handle_of(model).close()


def explain(model: nn.Module) -> Explanation:
    """The plan of a model, to print or to display in a notebook."""
    return Explanation(handle_of(model).plan)


def handle_of(model: nn.Module) -> Handle:
    """`model.penstock`, or an error that says what kind of model has one."""
    handle = getattr(model, "penstock", None)
    if not isinstance(handle, Handle):
        raise UsageError("this model does not run under penstock: load it with penstock.load or pass it to offload")
    return handle


def _wanted(max_memory: MaxMemory) -> Wanted:
    budget = parse_budget(max_memory)
    return Wanted(host=budget.host, device=budget.device, disk=budget.disk)


def _folders(disk: Folders | None) -> list[str]:
    """Scratch folders as asked for; an empty list is the default one."""
    if disk is None:
        return []
    named = [disk] if isinstance(disk, str | os.PathLike) else list(disk)
    if not named:
        raise UsageError("disk is an empty list: name a folder, or leave it out for the default in the user's cache")
    return [os.fspath(folder) for folder in named]


__all__ = ["Device", "close", "explain", "handle_of", "link_cache", "load", "offload"]
