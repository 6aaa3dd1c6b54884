"""`penstock.offload`: a module that is already built gives its weights up to the tiers below it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..memory.capacity import disk_capacity
from ..memory.errors import DiskError, UsageError
from ..memory.scratch import Scratch, process_scratch
from ..scheduler.plan import Links
from .backing import ModuleBacking
from .build import Machinery
from .devices.base import Device
from .export import Exporter
from .handle import Handle, refuse_moves
from .headroom import FRAMEWORK, headroom_nbytes
from .links import LinkCache, disk_read_rate, link_rate
from .partition import streamable
from .planned import make_plan, untouched_plan
from .planning import Layout, Planner
from .tiers import Wanted, reserve, resolve_budgets, skewed

logger = logging.getLogger(__name__)


def offload(
    module: nn.Module,
    *,
    wanted: Wanted,
    device: Device,
    disk: Sequence[str],
    context: int | None,
    batch: int | None,
    cache: LinkCache,
) -> nn.Module:
    """Plan the module and move its weights. See `penstock.offload`."""
    scratches: list[Scratch] = []
    machinery: Machinery | None = None
    try:
        _check(module)
        parameters = streamable(module)
        total = sum(parameter.nbytes for parameter in parameters.values())
        config = getattr(module, "config", None)
        dtype = next((p.dtype for p in parameters.values()), torch.float32)
        headroom = FRAMEWORK if config is None else headroom_nbytes(config, dtype, context=context, batch=batch)
        rate = link_rate(device, cache)
        budgets = resolve_budgets(wanted, device, headroom_nbytes=headroom, disk_rate=None, link_rate=rate)
        backing = ModuleBacking(parameters)
        layout = Planner(module, backing, budgets, buffers_nbytes=0, keep_skew=skewed(device)).best()
        if layout.resident and not device.separate:
            plan = untouched_plan(device, budgets, total, "everything fits: the module was left as it is")
            module.penstock = Handle(module, plan, None)  # type: ignore[assignment]
            device.close()
            return module
        if needs_scratch(layout):
            scratches = open_scratch(disk)
            _check_room(scratches, layout, wanted.disk, sum(parameters[n].nbytes for n in layout.tables))
            backing.store_in([os.path.join(scratch.path, "weights.bin") for scratch in scratches])
        buffers_to(module, device.torch_device)
        machinery = Machinery(device=device, layout=layout, backing=backing, module=module)
        disk_rate = disk_read_rate(backing.paths, cache, device) if backing.paths else None
        plan = make_plan(layout, device, budgets, Links(disk_read=disk_rate, h2d=rate), total)
        for booked in reserve(type(module).__name__, device, layout.host_nbytes, layout.device_nbytes):
            machinery.on_close(booked.release)
        for scratch in scratches:
            machinery.on_close(scratch.close)
        if layout.resident:
            machinery.load_all(module)
        else:
            machinery.start(module)
            folder = os.fspath(scratches[0].path) if scratches else tempfile.gettempdir()
            Exporter(machinery, backing, folder).install(module)
            refuse_moves(module, device.torch_device)
            generation: Any = getattr(module, "generation_config", None)
            if generation is not None:
                generation.disable_compile = True
        module.penstock = Handle(module, plan, machinery)  # type: ignore[assignment]
        return module
    except BaseException:
        if machinery is not None:
            machinery.close()
        else:
            device.close()
            for scratch in scratches:
                scratch.close()
        raise


def needs_scratch(layout: Layout) -> bool:
    """Whether something will live on disk."""
    kept = layout.front.resident | (layout.back.resident if layout.back else frozenset())
    return bool(layout.tables) or any(block.id not in kept for block in layout.blocks)


def buffers_to(module: nn.Module, device: torch.device) -> None:
    """Move all buffers, which never stream, to the device that computes."""
    for child in module.modules():
        for name, buffer in list(child._buffers.items()):
            if buffer is not None and buffer.device != device:
                child._buffers[name] = buffer.to(device)


def _check(module: nn.Module) -> None:
    if isinstance(getattr(module, "penstock", None), Handle):
        raise UsageError("this module is streamed already; call penstock.close(module) and build it again to replan")
    for path, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise UsageError(
                f"{path or 'the module'} is a ScriptModule, whose calls cannot be followed: offload it unscripted"
            )
        if isinstance(child.__dict__.get("penstock"), Handle) and child.penstock.streams:
            raise UsageError(
                f"{path} is streamed already: offload the outermost module once, or penstock.close({path})"
            )
    for name, parameter in module.named_parameters():
        if parameter.numel() > 1 and not any(parameter.stride()):
            raise UsageError(
                f"parameter {name} is streamed already, by another module that shares it: offload one module that "
                f"contains both"
            )
        if isinstance(parameter, UninitializedParameter):
            raise UsageError(f"parameter {name} has no shape yet: run the module once before offloading it")
        if parameter.device.type == "meta":
            raise UsageError(
                f"parameter {name} is on the meta device and has no values: load the checkpoint with penstock.load"
            )


def open_scratch(folders: Sequence[str]) -> list[Scratch]:
    """A scratch folder on each drive that was named, or the default one.

    Raises:
        ScratchBusyError: another process uses one of them; none stays open.
    """
    opened: list[Scratch] = []
    try:
        for folder in folders or (None,):
            opened.append(process_scratch().open(folder))
    except BaseException:
        for scratch in opened:
            scratch.close()
        raise
    return opened


def _check_room(scratches: Sequence[Scratch], layout: Layout, budget: int | None, tables_nbytes: int) -> None:
    kept = layout.front.resident | (layout.back.resident if layout.back else frozenset())
    needed = sum(block.image.nbytes for block in layout.blocks if block.id not in kept)
    needed += tables_nbytes
    folder, free = min(((str(s.path), disk_capacity(s.path).free_nbytes) for s in scratches), key=lambda pair: pair[1])
    if needed > free * len(scratches):
        raise DiskError(
            f"{needed} bytes of weights go to {folder}, where {free} bytes are free: free space there, or name another "
            f"folder with disk=… (--disk)"
        )
    if budget is not None and needed > budget:
        raise DiskError(f"{needed} bytes of weights go to disk; the disk budget is {budget} bytes: raise it")
