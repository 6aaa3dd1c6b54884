"""The public functions of training: prepare, save, resume."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from .api import handle_of
from .arguments import Folders, MaxMemory, folders_of
from .caches import link_cache
from .memory.errors import UsageError
from .memory.store import Commit
from .runtime.beside import Beside
from .runtime.training import adapters
from .runtime.training.facade import StreamedOptimizer
from .runtime.training.optimizers import SGD, AdamW, Lion, OptimizerChoice
from .runtime.training.preparing import (
    RunFolders,
    arrays_of,
    attach,
    check_new,
    check_trained,
    choice_of,
    go_on,
    run_folders,
    state_of_run,
)
from .runtime.training.run import Activations, Origin, RunState, Settings, Updates
from .scheduler.updating import Where, check_where
from .trainedmodel import Asked, streamed

logger = logging.getLogger(__name__)


def prepare(
    model: nn.Module | str | os.PathLike[str],
    *,
    optimizer: OptimizerChoice,
    disk: Folders,
    lora: Any = None,
    max_memory: MaxMemory = "auto",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    accumulate: int = 1,
    activations: Activations = "auto",
    updates: Updates = "step",
    update_on: Where = "auto",
    nonfinite: Literal["raise", "skip"] = "raise",
    context: int | None = None,
    batch: int | None = None,
    packed: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Any, StreamedOptimizer]:
    """Train a model whose weights, gradients and optimizer states are larger than memory.

    Use what is returned as in plain PyTorch: `loss.backward(); optimizer.step(); optimizer.zero_grad()`. Losses and
    weights have the bits of a run in memory with an fp32 master of each trained parameter.

    Args:
        model: A module that is built, or a checkpoint (a folder, or a Hub id). Of a module those parameters are trained
            that have `requires_grad`; of a checkpoint all of them. Where PEFT has put adapters into a module, what is
            trained stays in host memory, and the rest streams.
        optimizer: `penstock.AdamW(…)`, `penstock.SGD(…)` or `penstock.Lion(…)`.
        disk: The folder of the run, or one on each of several drives: masters and states lie there, 12 bytes per
            parameter for AdamW, twice, so that the last commit stays whole while the next one grows. It must be empty.
        lora: A `peft.LoraConfig`: these adapters are put into the model, and nothing else is trained. They, their
            masters and states are in host memory, and written when a commit is made; the model's own weights are only
            read, a checkpoint's from its own files. What is returned is a `peft.PeftModel`.
        max_memory: As for `load`; `host` bounds weights, gradients, states that stay in memory, and what updates pass
            through. Gradients that have no room go to disk.
        device: As for `load`.
        dtype: What a checkpoint is computed in.
        accumulate: Backward passes of each step, at most; their gradients are added up in fp32.
        activations: "keep" them in memory; "recompute" those of layers in backward, which takes about a third more time
            and little memory; "offload" them to host memory, where a device apart computes, and to disk. "auto" keeps
            them where all weights stay; where weights are streamed, a plan is made of what the first forward shows:
            what there is room for is held, the rest goes where it costs less than making it again, or is made again.
        updates: "step": all at `step()`, as in PyTorch; until then gradients of the whole model are in memory, or on
            disk. "backward": each part as soon as its last gradient is there, which needs memory for few gradients and
            works beside backward. Then every backward pass (`accumulate` of them) must be followed by `step()`,
            gradients cannot be clipped or dropped, and learning rates may change only after `step()`.
        update_on: Which processor updates masters and states beside a GPU: "cpu", "device" (they go there and come
            back), or "auto": both, as much on each as by the machine's calibration (`penstock calibrate`) takes least
            time, and the CPU where there is none. `penstock.explain` says what came of it. The last bit of a result
            may depend on the processor.
        nonfinite: What `step()` does where a gradient is infinite or not a number: raise, or skip that step.
        context: Tokens per sequence to leave room for, in automatic budgets: activations, logits and their gradients.
            In a named budget of a CPU, what activations are weighed by against weights, where the machine is
            calibrated; without it weights come first.
        batch: Sequences of a backward pass, likewise; 1 where it is not said.
        packed: Whether they hold several documents each, which `position_ids` keep apart: each layer then saves a mask.
        trust_remote_code: Run code that comes with the checkpoint.

    Raises:
        DoesNotFitError: the memory or a drive is too small.
        StoreError: the folder holds a run already (`penstock.resume`), or something else.
        UsageError: an argument has no meaning, or nothing is to be trained.
    """
    folders = run_folders(folders_of(disk))
    settings = _settings(accumulate, activations, updates, nonfinite, optimizer.max_grad_norm)
    check_where(update_on)
    if lora is not None:
        adapters.check_config(lora)
    check_new(folders)  # before a module gives its weights up
    asked = Asked(
        max_memory=max_memory,
        device=device,
        context=context,
        batch=batch,
        packed=packed,
        trust=trust_remote_code,
        where=update_on,
    )
    return _begun(model, lora, asked, dtype, settings, folders, optimizer)


def save(model: nn.Module, optimizer: StreamedOptimizer, *, scheduler: Any = None, extra: Any = None) -> Commit:
    """Make the present state of a run durable: a commit of what is on disk already, and of states in host memory.

    Returns a handle at once. The updates of the last step go on beside the next forward; when they are done, states in
    host memory are written, and the commit is published, in the background (`handle.wait()`).

    Args:
        model: What `prepare` or `resume` returned.
        optimizer: Likewise.
        scheduler: Of the learning rate; its `state_dict()` is kept.
        extra: Anything that JSON can hold, such as the position in the data. `optimizer.extra` after `resume`.

    Raises:
        UsageError: `extra` cannot be written.
        PenstockError: what the last step has met in the background; what it meets later is the handle's error.
    """
    handle_of(model)
    return optimizer.commit(None if scheduler is None else scheduler.state_dict(), extra)


def resume(
    folder: Folders,
    *,
    model: nn.Module | None = None,
    max_memory: MaxMemory = "auto",
    device: str | torch.device = "auto",
    nonfinite: Literal["raise", "skip"] = "raise",
    accumulate: int = 1,
    activations: Activations = "auto",
    updates: Updates = "step",
    update_on: Where = "auto",
    scheduler: Any = None,
    context: int | None = None,
    batch: int | None = None,
    packed: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Any, StreamedOptimizer]:
    """Go on from the last commit of a run: weights, optimizer, random numbers.

    Args:
        folder: What was `disk` of `prepare`.
        model: The module as it was built before `prepare`, where that was not given a checkpoint. Its weights are
            replaced; parameters that are not trained keep what they have. Adapters that `prepare` put into it are put
            into it again.
        max_memory: As for `prepare`; it may differ.
        device: Likewise.
        nonfinite: Likewise.
        accumulate: Likewise.
        activations: Likewise.
        updates: Likewise.
        update_on: Likewise.
        scheduler: Called with the optimizer to make the learning rate's scheduler, which then goes on; it becomes
            `optimizer.scheduler`. Where the commit has no scheduler's state it begins anew, and a warning says so.
        context: As for `prepare`: it is not kept with the run.
        batch: Likewise.
        packed: Likewise.
        trust_remote_code: Run code that comes with the checkpoint.

    Raises:
        StoreError: there is no run, or nothing was committed.
        UsageError: the model is another one, or none was given where one is needed.
    """
    folders = run_folders(folders_of(folder))
    state = state_of_run(folders)
    if model is None and state.source is None:
        raise UsageError("the run was begun with a module, not a checkpoint: give it to resume(…, model=…), as built")
    source: Any = state.source if model is None else model
    settings = _settings(accumulate, activations, updates, nonfinite, state.max_grad_norm)
    check_where(update_on)
    asked = Asked(
        max_memory=max_memory,
        device=device,
        context=context,
        batch=batch,
        packed=packed,
        trust=trust_remote_code,
        where=update_on,
    )
    return _gone_on(source, state, asked, settings, folders, scheduler)


def _begun(
    model: nn.Module | str | os.PathLike[str],
    lora: Any,
    asked: Asked,
    dtype: str | torch.dtype,
    settings: Settings,
    folders: RunFolders,
    choice: OptimizerChoice,
) -> tuple[nn.Module, StreamedOptimizer]:
    """A new run."""
    with adapters.put_if_built(model, lora) as wrapped:
        frozen = lora is not None
        if isinstance(wrapped, nn.Module):
            frozen = adapters.is_adapted(wrapped)
            check_trained(wrapped, choice)
        beside = None
        if frozen:
            settings.check_frozen()
            own = None if isinstance(wrapped, nn.Module) else lora
            beside = _beside(own, choice, settings)
        made, origin, settings = streamed(wrapped, asked, dtype, settings, folders, choice=choice, beside=beside)
    try:
        if frozen:
            text = None if lora is None else adapters.as_text(made)
            origin = replace(origin, adapters=text, frozen=True)
        return made, attach(made, choice, folders, origin=origin, settings=settings, cache=link_cache())
    except BaseException:
        handle_of(made).close()
        raise


def _gone_on(
    source: Any, state: RunState, asked: Asked, settings: Settings, folders: RunFolders, scheduler: Any
) -> tuple[nn.Module, StreamedOptimizer]:
    """A run from its last commit."""
    lora = None if state.adapters is None else adapters.from_text(state.adapters)
    with adapters.put_if_built(source, lora) as wrapped:
        beside, choice = None, choice_of(state)
        if state.frozen:
            settings.check_frozen()
            own = None if isinstance(wrapped, nn.Module) else lora
            beside = _beside(own, choice, settings, trained=state.names)
        made, _, settings = streamed(
            wrapped, asked, state.dtype, settings, folders, choice=choice, limit=state.limit_nbytes, beside=beside
        )
    origin = Origin(source=state.source, dtype=state.dtype, adapters=state.adapters, frozen=state.frozen)
    try:
        optimizer = go_on(made, folders, origin=origin, settings=settings, cache=link_cache())
        if scheduler is not None:
            _schedule(optimizer, scheduler)
        return made, optimizer
    except BaseException:
        handle_of(made).close()
        raise


def _schedule(optimizer: StreamedOptimizer, scheduler: Any) -> None:
    """Make the learning rate's scheduler, and have it go on."""
    groups = [{**group} for group in optimizer.param_groups]
    optimizer.scheduler = scheduler(optimizer)
    if optimizer.saved_scheduler is None:
        logger.warning(
            "the last commit of the run has no state of a scheduler, so the one that was given begins with its first "
            "step; penstock.save(…, scheduler=…) makes it part of commits"
        )
        return
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update(saved)  # a scheduler begins by setting the rate of its own first step
    optimizer.scheduler.load_state_dict(optimizer.saved_scheduler)


def _beside(lora: Any, choice: OptimizerChoice, settings: Settings, *, trained: Sequence[str] | None = None) -> Beside:
    """What is trained beside frozen weights."""
    return adapters.beside(
        lora,
        arrays=arrays_of(choice),
        accumulate=settings.accumulate,
        activations=settings.activations,
        trained=trained,
    )


def _settings(
    accumulate: int, activations: Activations, updates: Updates, nonfinite: str, max_grad_norm: float | None
) -> Settings:
    if nonfinite not in ("raise", "skip"):
        raise UsageError(f'nonfinite is {nonfinite!r}: use "raise" or "skip"')
    settings = Settings(
        accumulate=accumulate, activations=activations, updates=updates, skip_nonfinite=nonfinite == "skip"
    )
    settings.check(max_grad_norm)
    return settings


__all__ = ["SGD", "AdamW", "Lion", "OptimizerChoice", "StreamedOptimizer", "prepare", "resume", "save"]
