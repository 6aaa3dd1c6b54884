"""A model that streams for training, in the room that was asked for."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .arguments import MaxMemory, wanted_of
from .caches import calibration_cache, link_cache
from .devices import open_device
from .memory.errors import UsageError
from .runtime.beside import Beside, trained_in
from .runtime.devices.base import Device
from .runtime.feeding import with_context
from .runtime.layout import Changing
from .runtime.loading import load as _load
from .runtime.offloading import offload as _offload
from .runtime.pretrained import outline
from .runtime.training import adapters
from .runtime.training.headroom import StepRoom, is_automatic, step_room
from .runtime.training.optimizers import OptimizerChoice
from .runtime.training.preparing import (
    RunFolders,
    arrays_of,
    trainable,
)
from .runtime.training.room import changing, sizes_of, with_saves
from .runtime.training.run import Origin, Settings
from .runtime.training.savedcount import forward_saves
from .runtime.training.saves import ForwardSaves
from .runtime.training.updateshares import update_shares
from .runtime.training.weighed import weighing
from .scheduler.sizes import Workload
from .scheduler.updating import UpdateShares, Where
from .scheduler.weighing import Weighing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a user said of the machine."""

    max_memory: MaxMemory
    device: str | torch.device
    context: int | None
    batch: int | None
    packed: bool
    trust: bool
    where: Where


def streamed(
    model: nn.Module | str | os.PathLike[str],
    asked: Asked,
    dtype: str | torch.dtype,
    settings: Settings,
    folders: RunFolders,
    *,
    choice: OptimizerChoice,
    limit: int | None = None,
    beside: Beside | None = None,
) -> tuple[nn.Module, Origin, Settings]:
    """The model, where it came from, and settings in which it is said what becomes of activations, if that is known."""
    wanted = wanted_of(asked.max_memory)
    settings = replace(settings, device_is_named=wanted.device is not None)
    opened = open_device(asked.device)
    if asked.where == "device" and (beside is not None or not opened.separate):
        opened.close()
        why = "the CPU computes everything here" if not opened.separate else "adapters are few, and stay on the host"
        raise UsageError(f'update_on="device" has no device to update on: {why}; leave it out, or say "auto"')
    if opened.separate and beside is None:
        itemsize = _itemsize(model, dtype, asked.trust)
        settings = replace(settings, shares=_shares(opened, asked.where, choice, wanted.device, itemsize))
    trains = partial(
        changing,
        accumulate=settings.accumulate,
        early=settings.updates == "backward",
        arrays=arrays_of(choice),
        limit=limit,
        separate=opened.separate,
        on_device=settings.shares.any,
        activations=settings.activations,
    )
    try:
        bones = _bones(model, asked, dtype, beside)
        saves = _saves(adapters.without_adapters(bones), asked, opened)
        settings = replace(settings, saves=saves)
        room = _rehearsed(bones, asked, settings, opened, trains=trains, beside=beside)
    except BaseException:
        opened.close()
        raise
    if room is not None:
        settings = replace(settings, activations=room.activations)
    trains = partial(trains, activations=settings.activations, saves=saves)
    if room is not None and not room.known:  # then what is left over is for activations, not for states
        trains = partial(trains, arrays=0)
    elif room is None and beside is None and not opened.separate:
        trains = partial(trains, weighing=_weighed(bones, asked, settings, opened, choice))
    if beside is not None:
        beside = _counted(beside, settings)
    common: dict[str, Any] = {
        "wanted": wanted,
        "device": opened,
        "disk": folders.scratch,
        "context": asked.context,
        "batch": asked.batch,
        "cache": link_cache(),
        "trains": None if beside is not None else trains,
        "beside": beside,
        "headroom": None if room is None else room.headroom_nbytes,
    }
    if isinstance(model, nn.Module):
        return _offload(model, **common), Origin(), settings
    made = _load(model, dtype=dtype, trust_remote_code=asked.trust, **common)
    if beside is None:
        trainable(made)
    source = os.path.abspath(model) if os.path.isdir(model) else os.fspath(model)
    return made, Origin(source=source, dtype=str(dtype).removeprefix("torch.")), settings


def _saves(bones: nn.Module, asked: Asked, device: Device) -> ForwardSaves | None:
    """What a forward leaves for backward, of as many tokens as a rehearsal takes where they are not said."""
    context = asked.context
    if context is None and isinstance(bones, PreTrainedModel) and is_automatic(wanted_of(asked.max_memory), device):
        context = with_context(bones, Workload(train="adamw")).context
    return forward_saves(bones, context=context, batch=asked.batch, packed=asked.packed)


def _counted(beside: Beside, settings: Settings) -> Beside:
    """The same, where it was not known what a forward leaves for backward."""

    def changing(parameters: Sequence[nn.Parameter], device: Device) -> Changing:
        return with_saves(beside.changing(parameters, device), settings.saves, settings.activations)

    return replace(beside, changing=changing)


def _rehearsed(
    bones: nn.Module,
    asked: Asked,
    settings: Settings,
    device: Device,
    *,
    trains: partial[Changing],
    beside: Beside | None,
) -> StepRoom | None:
    """What a step takes, where a budget is worked out from it; None where none is."""
    wanted = wanted_of(asked.max_memory)
    if not is_automatic(wanted, device):
        return None
    sizes = list(trained_in(bones).values())
    return step_room(
        adapters.without_adapters(bones),
        trains(*sizes_of(bones)) if beside is None else beside.changing(sizes, device),
        wanted=wanted,
        device=device,
        activations=settings.activations,
        context=asked.context,
        batch=asked.batch,
        packed=asked.packed,
        saves=settings.saves,
    )


def _weighed(
    bones: nn.Module, asked: Asked, settings: Settings, device: Device, choice: OptimizerChoice
) -> Weighing | None:
    """A step, to weigh activations against weights by: where a plan decides about them, on a machine that has been
    calibrated."""
    kept = calibration_cache().read(device).trusted
    if kept is None or settings.activations != "auto":
        return None
    if asked.context is None:
        logger.info(
            "weights come before activations: how many tokens a backward pass has is not known, so the two cannot be "
            "weighed. Say it with context= and batch="
        )
        return None
    tokens = asked.context * (asked.batch or 1)
    early = settings.updates == "backward"
    return weighing(
        bones, settings.saves, kept.hardware, choice, tokens=tokens, accumulate=settings.accumulate, early=early
    )


def _itemsize(model: nn.Module | str | os.PathLike[str], dtype: str | torch.dtype, trust: bool) -> int:
    """Bytes of an element of most weights."""
    made = model if isinstance(model, nn.Module) else outline(model, dtype=dtype, trust_remote_code=trust)
    counts = Counter[int]()
    for parameter in made.parameters():
        counts[parameter.itemsize] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else 1


def _shares(device: Device, where: Where, choice: OptimizerChoice, budget: int | None, itemsize: int) -> UpdateShares:
    """What the device updates, by what a calibration of this machine says, if there is one that holds."""
    kept = calibration_cache().read(device).trusted
    device_nbytes = device.available_nbytes() if budget is None else budget
    hardware = None if kept is None else kept.hardware
    return update_shares(where, hardware, choice, itemsize=itemsize, device_nbytes=device_nbytes)


def _bones(
    model: nn.Module | str | os.PathLike[str], asked: Asked, dtype: str | torch.dtype, beside: Beside | None
) -> nn.Module:
    """The model as it is to be trained; that of a checkpoint without weights."""
    if isinstance(model, nn.Module):
        return model
    made: nn.Module = outline(model, dtype=dtype, trust_remote_code=asked.trust)
    if beside is None:
        trainable(made)
        return made
    with torch.random.fork_rng(devices=[]):  # adapters are made twice, and drawn once
        return beside.put(made)
