"""`penstock.load`: a checkpoint becomes a model whose weights stay where they are until they are used."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from ..memory.disk import DiskEngine
from ..memory.layout import TensorSource
from ..scheduler.cost import CostModel
from ..scheduler.experts.costs import expert_costs
from ..scheduler.plan import Links, Plan
from .backing import CheckpointBacking
from .beside import Beside, renamed, trained_in
from .binding import placeholder
from .deciding import Decisions
from .devices.base import Device
from .dtypes import stored_dtype
from .experts.layers import shape_of
from .handle import Handle
from .headroom import headroom_nbytes, kv_nbytes
from .launch import launch
from .layout import Budgets, Changing, Layout, Trains
from .links import LinkCache, disk_read_rate, link_rate
from .planned import make_plan
from .planning import Planner
from .pretrained import Skeleton, skeleton
from .repacking import on_disk, read_tensor
from .replanning import check_fits
from .tiers import Wanted, resolve_budgets, skewed
from .units import Processors, find_units, settled


def load(
    path: str | os.PathLike[str],
    *,
    wanted: Wanted,
    device: Device,
    dtype: str | torch.dtype,
    disk: Sequence[str],
    context: int | None,
    batch: int | None,
    trust_remote_code: bool,
    cache: LinkCache,
    processors: Processors | None = None,
    decisions: Decisions | None = None,
    plan: Plan | None = None,
    costs: CostModel | None = None,
    trains: Trains | None = None,
    headroom: int | None = None,
    beside: Beside | None = None,
) -> nn.Module:
    """Build the model, plan it, and start reading. See `penstock.load`.

    Args:
        processors: Chooses what the CPU computes; nothing without.
        decisions: Choose that, and what stays where, by what a token costs; None where that is not known.
        plan: To be carried out as it is, within the budgets; nothing is decided then.
        costs: What operations take on this machine, for choices that are made when many prompts run; None where that is
            not known.
        trains: Weights will change; what that takes beside them. None where they are only read.
        headroom: Bytes that automatic budgets leave free; None for those of inference.
        beside: They stay frozen, and something else is trained. What is returned is the model that it was put into.
    """
    with ExitStack() as held:
        held.callback(device.close)
        bones = skeleton(path, dtype=dtype, trust_remote_code=trust_remote_code)
        if headroom is None:
            headroom = headroom_nbytes(bones.config, bones.model.dtype, context=context, batch=batch)
        kv = 0
        if wanted.host is not None:  # else they are left room for already
            kv = kv_nbytes(bones.config, bones.model.dtype, context=context, batch=batch)
        model, backing = _weightless(bones, on_disk(bones, disk, wanted.disk, held), device, beside)
        links = Links(disk_read=disk_read_rate(backing.files(), cache, device), h2d=link_rate(device, cache))
        budgets = _budgets(wanted, device, links, headroom, decisions)
        changing = _changing(model, backing, device, trains, beside)
        planner = Planner(
            model,
            backing,
            budgets,
            buffers_nbytes=sum(buffer.nbytes for buffer in model.buffers()),
            keep_skew=skewed(device),
            work=None if decisions is None else decisions.of(model),
            changing=changing,
            beside_nbytes=kv,
            experts=changing is None,
        )
        layout, notes = _laid_out(planner, device, plan, processors, decisions, kv)
        left = None if wanted.host is None else budgets.host - layout.host_nbytes
        most_keys = 1.0 if left is None else left / max(kv, 1)
        launch(
            model,
            owner=os.fspath(path),
            device=device,
            layout=layout,
            plan=lambda: _planned(model, layout, device, budgets, links, notes, decisions, most_keys=most_keys),
            backing=backing,
            export_folder=_temporary_folder(),
            held=held,
            changing=changing,
        )
        _tell_costs(model, layout, costs, decisions, host_left=left)
        if layout.resident and changing is None:
            _as_pretrained(model)
    return model


def _weightless(
    bones: Skeleton, sources: dict[str, TensorSource], device: Device, beside: Beside | None
) -> tuple[nn.Module, CheckpointBacking]:
    """The model with real buffers and placeholders for weights, put into what is trained beside it; where these are."""
    model: nn.Module = bones.model
    _real_buffers(model, sources, device)
    _placeholders(model, sources, device)
    dtypes = {name: stored_dtype(bones.dtypes[name]) for name in sources}
    if beside is not None:
        named = dict(model.named_parameters())
        model = beside.put(model)
        sources, dtypes = renamed(sources, named, model), renamed(dtypes, named, model)
    return model, CheckpointBacking(sources, dtypes, {name: source.shape for name, source in sources.items()})


def _budgets(wanted: Wanted, device: Device, links: Links, headroom: int, decisions: Decisions | None) -> Budgets:
    """Bytes of each tier that the model may take."""
    return resolve_budgets(
        wanted,
        device,
        headroom_nbytes=headroom,
        disk_rate=links.disk_read,
        link_rate=links.h2d,
        on_cpu=decisions is not None and not decisions.exact,
    )


def _changing(
    model: nn.Module, backing: CheckpointBacking, device: Device, trains: Trains | None, beside: Beside | None
) -> Changing | None:
    """What weights that will change take beside them; None where they are only read."""
    if beside is not None:
        return beside.changing(list(trained_in(model).values()), device)
    if trains is None:
        return None
    return trains(backing.sizes(), max(backing.itemsizes(), default=1))


def _laid_out(
    planner: Planner,
    device: Device,
    plan: Plan | None,
    processors: Processors | None,
    decisions: Decisions | None,
    kv: int,
) -> tuple[Layout, tuple[str, ...]]:
    """Where blocks lie and what computes them, as planned or by what is best, and notes on what stays where it is."""
    layout = planner.best() if plan is None else planner.as_planned(plan)
    if decisions is not None and processors is None and plan is None:
        processors = decisions.processors
    budgets = planner.budgets
    room = None if decisions is None else budgets.host - kv
    layout, notes = settled(planner.module, layout, device.torch_device, processors, host_nbytes=room)
    if plan is not None:
        check_fits(layout, budgets)  # with the copies of small tensors that the CPU needs
    return layout, notes


def _planned(
    model: nn.Module,
    layout: Layout,
    device: Device,
    budgets: Budgets,
    links: Links,
    notes: tuple[str, ...],
    decisions: Decisions | None,
    *,
    most_keys: float,
) -> Plan:
    """The plan of a layout, with what several micro-batches at once will make of it where it is loaded for them."""
    decides = decisions is not None and not decisions.exact
    plan = make_plan(
        layout,
        device.name,
        budgets,
        links,
        sum(block.image.data_nbytes for block in layout.blocks),
        notes,
        exact=decisions is not None and decisions.exact,
        exact_cost_s=None if decisions is None else decisions.exact_cost_s(model, layout),
        experts_shared=decides and layout.experts is not None and layout.experts.apart,
    )
    if decisions is None or decisions.lanes == 1 or not layout.on_cpu:
        return plan
    units = find_units(model, layout, device.torch_device)
    return decisions.with_lanes(plan, model, layout, units, most_keys=most_keys)


def _tell_costs(
    model: nn.Module, layout: Layout, costs: CostModel | None, decisions: Decisions | None, *, host_left: int | None
) -> None:
    """Let whoever decides while the model runs know what that costs here: experts that are blocks of their own are read
    ahead by it, and computed by a CPU."""
    handle: Handle = model.penstock  # type: ignore[assignment]
    if handle.machinery is None:
        return
    handle.machinery.costs = costs
    handle.machinery.host_left_nbytes = host_left
    experts = handle.machinery.session.experts
    if experts is None or layout.experts is None or costs is None:
        return
    each = expert_costs(costs, shape_of(model, layout.experts.layers[0]))
    shared = decisions is not None and not decisions.exact
    experts.look_ahead(each, exact=not shared)
    if shared:
        experts.share_with_cpu(each)


def _as_pretrained(model: nn.Module) -> None:
    """Let resident weights want gradients, as those of from_pretrained do: torch chooses kernels by it."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)


def _temporary_folder() -> str:
    root = Path(os.environ.get("TMPDIR", "/var/tmp"))
    return str(root if root.is_dir() else Path.cwd())


def _real_buffers(model: nn.Module, sources: dict[str, TensorSource], device: Device) -> None:
    """Read persistent buffers, which never stream, and move all buffers to the device that computes."""
    engine = DiskEngine()
    try:
        made: dict[int, torch.Tensor] = {}
        for path, module in model.named_modules():
            for name, buffer in list(module._buffers.items()):
                if buffer is None:
                    continue
                full = f"{path}.{name}" if path else name
                if id(buffer) not in made:
                    value = buffer
                    if buffer.device.type == "meta":
                        value = read_tensor(engine, sources[full], stored_dtype(buffer.dtype))
                    made[id(buffer)] = value.to(device.torch_device)
                module._buffers[name] = made[id(buffer)]
                sources.pop(full, None)
    finally:
        engine.close()


def _placeholders(model: nn.Module, sources: Mapping[str, TensorSource], device: Device) -> None:
    """Put a real Parameter (one NaN, expanded) in the place of each one on the meta device; ties stay ties."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                if parameter.device.type == "meta":
                    fresh = nn.Parameter(placeholder(parameter, device.torch_device), requires_grad=False)
                    fresh.__dict__.update(parameter.__dict__)
                else:
                    fresh = parameter
                    fresh.data = fresh.data.to(device.torch_device)
                    fresh.requires_grad_(False)
                made[id(parameter)] = fresh
            module._parameters[name] = made[id(parameter)]
