"""The public functions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .arguments import Folders, MaxMemory, folders_of, wanted_of
from .caches import calibration_cache, link_cache
from .devices import open_device
from .memory.errors import UsageError
from .runtime.deciding import Decisions
from .runtime.devices.base import Device
from .runtime.explain import Explanation
from .runtime.handle import Handle
from .runtime.loading import load as _load
from .runtime.offloading import offload as _offload
from .runtime.throughput import Completions
from .runtime.throughput_choice import Sampling
from .runtime.throughput_start import Asked, Limits, check_prompts, start
from .runtime.tiers import Wanted
from .scheduler.cost import CostModel
from .scheduler.plan import Plan
from .scheduler.planfile import read_plan, write_plan
from .sizes import parse_size


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
    plan: Plan | str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a Hugging Face checkpoint that may be larger than memory, without ever materialising it.

    Returns the transformers model that its config names, in eval mode, with `requires_grad=False` as long as it is
    streamed; `generate()` and the forward are transformers' own. Weights are read from the original safetensors files
    as they are needed; what fits the budget stays. Answers are bit-identical to the resident model's, with one
    exception: on a machine with a device that has been calibrated (`penstock calibrate`), layers that stay in host
    memory are computed there by the CPU where that is faster than to copy them, and results are then equal to rounding.
    The plan says where; `exact=True` forbids it.

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
        exact: Forbid whatever gives results that are only equal to rounding. The plan says what that costs.
        plan: A plan to carry out as it is, or the file of one, from `save_plan` or `penstock plan --save`; it may have
            been edited (homes, slots, processors). Budgets that `max_memory` does not name are the plan's.
        trust_remote_code: Run code that comes with the checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or disagrees with its config.
        DoesNotFitError: the budget is too small even for streaming; nothing was loaded.
        UsageError: an argument has no meaning, or the plan is for another model or another kind of device.
    """
    return load_for_lanes(
        path,
        max_memory=max_memory,
        device=device,
        dtype=dtype,
        disk=disk,
        context=context,
        batch=batch,
        exact=exact,
        plan=plan,
        trust_remote_code=trust_remote_code,
        lanes=1,
    )


def load_for_lanes(
    path: str | os.PathLike[str],
    *,
    max_memory: MaxMemory,
    device: str | torch.device,
    dtype: str | torch.dtype,
    disk: Folders | None,
    context: int | None,
    batch: int | None,
    exact: bool,
    plan: Plan | str | os.PathLike[str] | None,
    trust_remote_code: bool,
    lanes: int,
) -> Any:
    """As `load`, placed for sequences that run in so many micro-batches at once, where placing knows what that changes.

    Args, errors: as for `load`; `batch` counts the sequences of all micro-batches.
    """
    wanted, folders = wanted_of(max_memory), folders_of(disk)  # before a device is opened, which starts threads
    given = plan if plan is None or isinstance(plan, Plan) else read_plan(plan)
    if given is not None:
        wanted = _as_planned(wanted, given, exact)
    opened = open_device(device)
    decided = _decisions(opened, rows=-(-(batch or 1) // lanes), exact=exact, lanes=lanes)
    model = _load(
        path,
        wanted=wanted,
        device=opened,
        dtype=dtype,
        disk=folders,
        context=context,
        batch=batch,
        trust_remote_code=trust_remote_code,
        cache=link_cache(),
        decisions=None if given is not None else decided,
        plan=given,
        costs=_costs(opened) if decided is None else decided.costs,
    )
    handle: Any = model.penstock
    handle.exact = exact
    return model


def save_plan(plan: Plan, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a plan, such as `model.penstock.plan`, to a file that can be edited and given to `load(plan=…)`.

    Raises:
        UsageError: there is something at `path`, and `force` is false.
        DiskError: the file cannot be written.
    """
    write_plan(path, plan, force=force)


def _as_planned(wanted: Wanted, plan: Plan, exact: bool) -> Wanted:
    """Budgets as asked for, or else as the plan needs them."""
    if exact and any(block.cpu_rows_below for block in plan.blocks):
        raise UsageError("the plan has blocks computed on the CPU, which exact=True forbids: set cpu_rows_below to 0")
    host = wanted.host if wanted.host is not None else plan.host_budget_nbytes
    device = wanted.device if wanted.device is not None else plan.device_budget_nbytes
    return Wanted(host=host, device=device, disk=wanted.disk)


def _costs(device: Device) -> CostModel | None:
    """What a calibration says of a machine whose device and host are one tier; None where there is none that holds."""
    if device.separate:
        return None
    trusted = calibration_cache().read(device).trusted
    return None if trusted is None else CostModel(hardware=trusted.hardware)


def _decisions(device: Device, *, rows: int, exact: bool, lanes: int) -> Decisions | None:
    """What a calibration of this machine decides; None where there is none that holds, or nothing to decide."""
    if not device.separate:
        return None
    kept = calibration_cache().read(device)
    if kept.trusted is None:
        return None
    hardware = kept.trusted.hardware
    threads = torch.get_num_threads() if hardware.emulated else 0  # both processors are the same cores then
    return Decisions(costs=CostModel(hardware=hardware, threads=threads), rows=rows, exact=exact, lanes=lanes)


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
    wanted, folders = wanted_of(max_memory), folders_of(disk)
    return _offload(
        module,
        wanted=wanted,
        device=open_device(device),
        disk=folders,
        context=context,
        batch=batch,
        cache=link_cache(),
    )


def generate_many(
    model: Any,
    prompts: Iterable[str | Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] = 64,
    tokenizer: Any | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    ordered: bool = False,
    memory: int | str = "auto",
    rows: int | None = None,
    lanes: int | None = None,
) -> Completions:
    """Continue many prompts, with all of them sharing every pass over the weights.

    Prompts of like lengths form micro-batches. Several are under way at once, each in its own `generate`; all of them
    use a block before the next one is brought, so a sweep reads the streamed weights once and gives every sequence a
    token. As soon as a micro-batch has ended the next one begins, its prefill in the same sweeps as the others' tokens.

    Returns an iterator of `Completion`s as they finish, each with the index of its prompt. The work begins at once, in
    threads of its own; it ends with the iterator: when that is exhausted, closed, or dropped.

    How prompts are batched is decided by the prompts and by `rows` and `lanes`; where these are not given, they follow
    from the memory that is free. The same batches give the same bits (where a CPU has no bf16 instructions, and
    products in fp32 may be chosen by what is measured first, those of one run). Other batches, or prompts run by
    themselves, give results that are equal to rounding: where two tokens are almost equally likely, another one may
    be chosen.

    Args:
        model: What `load` or `offload` returned; a transformers model that continues texts.
        prompts: Lists of token ids, or texts where a tokenizer is given.
        max_new_tokens: The most to add to each prompt, or one number per prompt.
        tokenizer: Turns texts into token ids, and new tokens into `Completion.text`.
        temperature: Sample at this temperature; None or 0 takes the likeliest token.
        top_p: Sample from this share of the probability; default: as the checkpoint says.
        top_k: Sample from so many tokens; default: as the checkpoint says, or 50.
        seed: What a prompt draws depends on this, its index, and the model's scores, not on the other prompts.
        ordered: Give results in the order of the prompts; a finished one then waits for those before it.
        memory: For keys, values and activations: bytes or a size; "auto" is what is free beside the weights.
        rows: Prompts per micro-batch; default: chosen for the least time.
        lanes: Micro-batches at once, at most 16; default: chosen.

    Raises:
        UsageError: an argument has no meaning, or a prompt is empty or too long for the model; it is named.
        DoesNotFitError: the memory does not suffice for one prompt at a time.
        PenstockError: while iterating: the run failed. What was finished before has come before.
    """
    handle_of(model)
    listed = _token_ids(prompts, tokenizer)
    if not listed:
        raise UsageError("there are no prompts: give at least one")
    counts = [max_new_tokens] * len(listed) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(counts) != len(listed):
        raise UsageError(f"max_new_tokens has {len(counts)} numbers for {len(listed)} prompts: give one for each")
    limits = Limits(room_nbytes=None if memory == "auto" else parse_size(memory), rows=rows, lanes=lanes)
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    asked = [
        Asked(index=index, ids=tuple(ids), new_tokens=count, name=f"prompt {index}")
        for index, (ids, count) in enumerate(zip(listed, counts, strict=True))
    ]
    check_prompts(model, asked)
    decode = None if tokenizer is None else partial(tokenizer.decode, skip_special_tokens=True)
    return Completions(start(model, asked, sampling, limits=limits), ordered=ordered, decode=decode)


def _token_ids(prompts: Iterable[str | Sequence[int]], tokenizer: Any | None) -> list[list[int]]:
    if isinstance(prompts, str):
        raise UsageError("prompts is one text: give a list of prompts")
    found: list[list[int]] = []
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            found.append([int(token) for token in prompt])
        elif tokenizer is None:
            raise UsageError(f"prompt {index} is a text: give tokenizer=, or token ids")
        else:
            found.append(list(tokenizer(prompt)["input_ids"]))
    return found


def close(model: nn.Module) -> None:
    """Free everything that a streamed model holds: memory, threads, scratch files. It cannot run afterwards.

    In training the last step is carried out before. Steps that no `penstock.save` has are gone with the model.

    Raises:
        PenstockError: what that step met, if nobody has heard of it. Everything is free nevertheless.
    """
    handle_of(model).close()


def explain(model: nn.Module) -> Explanation:
    """The plan of a model, to print or to display in a notebook.

    Of experts that are blocks of their own it says what was missed so far, or before that what is expected to be.
    """
    return handle_of(model).explained()


def handle_of(model: nn.Module) -> Handle:
    """`model.penstock`, or an error that says what kind of model has one."""
    handle = getattr(model, "penstock", None)
    if not isinstance(handle, Handle):
        raise UsageError("this model does not run under penstock: load it with penstock.load or pass it to offload")
    return handle


__all__ = ["Device", "close", "explain", "generate_many", "handle_of", "link_cache", "load", "offload", "save_plan"]
