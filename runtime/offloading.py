"""`penstock.offload`: a module that is already built gives its weights up to the tiers below it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..memory.errors import UsageError
from ..scheduler.plan import Links, Plan
from .backing import ModuleBacking
from .beside import Beside, trained_in
from .devices.base import Device
from .handle import Handle
from .headroom import FRAMEWORK, headroom_nbytes
from .launch import check_room, launch, open_scratch, scratch_files
from .layout import Changing, Layout, Trains
from .links import LinkCache, disk_read_rate, link_rate
from .partition import streamable
from .planned import make_plan, untouched_plan
from .planning import Planner
from .profiler.registry import process_registry
from .tiers import Wanted, resolve_budgets, skewed
from .units import Processors, settled

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
    processors: Processors | None = None,
    trains: Trains | None = None,
    headroom: int | None = None,
    beside: Beside | None = None,
) -> nn.Module:
    """Plan the module and move its weights. See `penstock.offload`.

    Args:
        processors: Chooses what the CPU computes; nothing without.
        trains: Weights will change; what that takes beside them. None where they are only read.
        headroom: Bytes that automatic budgets leave free; None for those of inference.
        beside: Something else is trained, and stays in memory: what wants a gradient once that has been put in.
    """
    with ExitStack() as held:
        held.callback(device.close)
        _check(module)
        if beside is not None:
            module = beside.put(module)
        process_registry().introduce(module)
        resident = {} if beside is None else trained_in(module)
        parameters = {name: parameter for name, parameter in streamable(module).items() if name not in resident}
        total = sum(parameter.nbytes for parameter in parameters.values())
        if headroom is None:
            headroom = _headroom(module, parameters, context=context, batch=batch)
        rate = link_rate(device, cache)
        budgets = resolve_budgets(wanted, device, headroom_nbytes=headroom, disk_rate=None, link_rate=rate)
        backing = ModuleBacking(parameters)
        changing = _changing(parameters, trains)
        if beside is not None:
            changing = beside.changing(list(resident.values()), device)
        changes = changing is not None and changing.weights_change
        skew = skewed(device)
        planner = Planner(
            module, backing, budgets, buffers_nbytes=0, keep_skew=skew, changing=changing, experts=changing is None
        )
        layout, stays = settled(module, planner.best(), device.torch_device, processors)
        if layout.resident and not device.separate and changing is None:
            untouched = untouched_plan(device.name, budgets, total, "everything fits: the module was left as it is")
            module.penstock = Handle(module, untouched, None)  # type: ignore[assignment]
            return module
        export_folder = tempfile.gettempdir()
        if needs_scratch(layout, trains=changes):
            scratches = open_scratch(disk, held)
            export_folder = os.fspath(scratches[0].path)
            check_room(scratches, _scratch_nbytes(layout, parameters, trains=changes), wanted.disk)
            backing.store_in(scratch_files(scratches, "weights.bin"))

        def plan() -> Plan:
            disk_rate = disk_read_rate(backing.paths, cache, device) if backing.paths else None
            return make_plan(layout, device.name, budgets, Links(disk_read=disk_rate, h2d=rate), total, stays)

        freed = sum(parameter.nbytes for parameter in parameters.values() if parameter.device.type == "cpu")
        with _buffers_on(module, device.torch_device):
            launch(
                module,
                owner=type(module).__name__,
                device=device,
                layout=layout,
                plan=plan,
                backing=backing,
                export_folder=export_folder,
                held=held,
                freed_nbytes=freed,
                changing=changing,
            )
        for parameter in resident.values():
            parameter.data = parameter.data.to(device.torch_device)
    return module


def _headroom(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], *, context: int | None, batch: int | None
) -> int:
    """Bytes that automatic budgets leave free for inference; little is known of a module without a config."""
    config = getattr(module, "config", None)
    if config is None:
        return FRAMEWORK
    dtype = next((p.dtype for p in parameters.values()), torch.float32)
    return headroom_nbytes(config, dtype, context=context, batch=batch)


def _changing(parameters: Mapping[str, nn.Parameter], trains: Trains | None) -> Changing | None:
    """What weights that will change take beside them; None where they are only read."""
    if trains is None:
        return None
    widest = max((parameter.itemsize for parameter in parameters.values()), default=1)
    return trains([parameter.nbytes for parameter in parameters.values()], widest)


def kept_in_memory(layout: Layout, *, trains: bool) -> frozenset[int]:
    """Blocks whose only copy is in an arena. Weights that change are not kept on a device apart alone."""
    if layout.back is None:
        return layout.front.resident
    return layout.back.resident | (frozenset() if trains else layout.front.resident)


def needs_scratch(layout: Layout, *, trains: bool = False) -> bool:
    """Whether something will live on disk."""
    kept = kept_in_memory(layout, trains=trains)
    return bool(layout.tables) or any(block.id not in kept for block in layout.blocks)


def _scratch_nbytes(layout: Layout, parameters: Mapping[str, nn.Parameter], *, trains: bool) -> int:
    """Bytes of what lives in scratch files."""
    kept = kept_in_memory(layout, trains=trains)
    blocks = sum(block.image.nbytes for block in layout.blocks if block.id not in kept)
    return blocks + sum(parameters[name].nbytes for name in layout.tables)


@contextmanager
def _buffers_on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Move all buffers, which never stream, to the device that computes; back, if what follows fails."""
    found = [
        (child, name, buffer)
        for child in module.modules()
        for name, buffer in child._buffers.items()
        if buffer is not None and buffer.device != device
    ]
    for child, name, buffer in found:
        child._buffers[name] = buffer.to(device)
    try:
        yield
    except BaseException:
        for child, name, buffer in found:
            child._buffers[name] = buffer
        raise


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
