"""`penstock.load`: a checkpoint becomes a model whose weights stay where they are until they are used."""

from __future__ import annotations

import logging
import os
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..memory.arena import HostArena
from ..memory.casting import castable
from ..memory.disk import DiskEngine
from ..memory.errors import CheckpointError
from ..memory.image import bounces_of
from ..memory.layout import FileSpan, TensorSource
from ..memory.scratch import Scratch, process_scratch
from ..scheduler.plan import Links
from .backing import CheckpointBacking
from .binding import placeholder
from .build import Machinery
from .conversion import Converted
from .devices.base import Device
from .dtypes import stored_dtype, torch_dtype
from .export import Exporter
from .handle import Handle, refuse_moves
from .headroom import headroom_nbytes
from .links import LinkCache, disk_read_rate, link_rate
from .planned import make_plan
from .planning import Planner
from .pretrained import Skeleton, skeleton
from .tiers import Wanted, reserve, resolve_budgets, skewed

logger = logging.getLogger(__name__)


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
) -> nn.Module:
    """Build the model, plan it, and start reading. See `penstock.load`."""
    scratch: Scratch | None = None
    machinery: Machinery | None = None
    try:
        bones = skeleton(path, dtype=dtype, trust_remote_code=trust_remote_code)
        model = bones.model
        if disk or any(isinstance(source, Converted) for source in bones.sources.values()):
            scratch = process_scratch().open(disk[0] if disk else None)
        sources = _on_disk(bones, scratch)
        _real_buffers(model, sources, device)
        _placeholders(model, sources, device)
        dtypes = {name: stored_dtype(bones.dtypes[name]) for name in sources}
        shapes = {name: source.shape for name, source in sources.items()}
        backing = CheckpointBacking(sources, dtypes, shapes)
        files = sorted({span.path for source in sources.values() for span in source.spans})
        links = Links(disk_read=disk_read_rate(files, cache, device), h2d=link_rate(device, cache))
        budgets = resolve_budgets(
            wanted,
            device,
            headroom_nbytes=headroom_nbytes(bones.config, model.dtype, context=context, batch=batch),
            disk_rate=links.disk_read,
            link_rate=links.h2d,
        )
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        layout = Planner(model, backing, budgets, buffers_nbytes=buffers, keep_skew=skewed(device)).best()
        plan = make_plan(layout, device, budgets, links, sum(b.image.data_nbytes for b in layout.blocks))
        machinery = Machinery(device=device, layout=layout, backing=backing, module=model)
        for booked in reserve(os.fspath(path), device, layout.host_nbytes, layout.device_nbytes):
            machinery.on_close(booked.release)
        if scratch is not None:
            machinery.on_close(scratch.close)
        if layout.resident:
            machinery.load_all(model)
            _as_pretrained(model)
        else:
            machinery.start(model)
            _streaming_manners(model, machinery, backing, device)
        model.penstock = Handle(model, plan, machinery)  # type: ignore[assignment]
        return model
    except BaseException:
        if machinery is not None:
            machinery.close()
        else:
            device.close()
            if scratch is not None:
                scratch.close()
        raise


def _as_pretrained(model: nn.Module) -> None:
    """Let resident weights want gradients, as those of from_pretrained do: torch chooses kernels by it."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)


def _streaming_manners(model: Any, machinery: Machinery, backing: CheckpointBacking, device: Device) -> None:
    """What a streamed model does differently from a resident one."""
    folder = _temporary_folder()
    Exporter(machinery, backing, folder).install(model)
    refuse_moves(model, device.torch_device)
    generation = getattr(model, "generation_config", None)
    if generation is not None:  # generate() compiles the forward for static caches; leases cannot be traced
        generation.disable_compile = True


def _temporary_folder() -> str:
    root = Path(os.environ.get("TMPDIR", "/var/tmp"))
    return str(root if root.is_dir() else Path.cwd())


def _on_disk(bones: Skeleton, scratch: Scratch | None) -> dict[str, TensorSource]:
    """Every source as bytes in a file: what transformers computes from several tensors is computed once and kept."""
    found: dict[str, TensorSource] = {}
    stored = _StoredSpans(bones)
    converted = {name: source for name, source in bones.sources.items() if isinstance(source, Converted)}
    for name, source in bones.sources.items():
        if isinstance(source, TensorSource):
            found[name] = source if stored.holds(source) else replace(source, skew=0)
    if converted:
        assert scratch is not None
        logger.info(
            "repacking %d tensors that this model stores in another layout than it computes with", len(converted)
        )
        repacked = _repack(converted, os.path.join(scratch.path, "repacked.bin"))
        found.update(repacked)
    for name, source in found.items():
        target = stored_dtype(bones.dtypes[name])
        if not castable(source.dtype, target):
            raise CheckpointError(
                f"tensor {name} is stored as {source.dtype} and cannot be read as {target}: quantised checkpoints are "
                f"not supported yet; use the unquantised one"
            )
    return {name: found[name] for name in bones.sources}


class _StoredSpans:
    """Where each stored tensor lies, to be asked quickly."""

    def __init__(self, bones: Skeleton) -> None:
        self._spans: dict[str, list[tuple[int, int]]] = {}
        for stored in bones.checkpoint.tensors.values():
            for span in stored.spans:
                self._spans.setdefault(span.path, []).append((span.offset, span.offset + span.nbytes))
        for spans in self._spans.values():
            spans.sort()

    def holds(self, source: TensorSource) -> bool:
        """Whether a resident model maps the tensor where its file has it: it is one stored tensor, or a part of one."""
        if len(source.spans) != 1:
            return False
        (span,) = source.spans
        spans = self._spans.get(span.path, [])
        index = bisect_right(spans, (span.offset, sys.maxsize)) - 1
        return index >= 0 and span.offset + span.nbytes <= spans[index][1]


def _repack(converted: Mapping[str, Converted], path: str) -> dict[str, TensorSource]:
    engine = DiskEngine()
    found: dict[str, TensorSource] = {}
    at = 0
    staging = HostArena(4 * 2**20, tier="staging")
    try:
        for name, source in converted.items():
            stored = {key: read_tensor(engine, part) for key, part in source.sources.items()}
            value = source.convert(stored)[name].contiguous()
            dtype = stored_dtype(value.dtype)
            raw = value.view(-1).view(torch.uint8)
            for start in range(0, len(raw), staging.nbytes):
                piece = raw[start : start + staging.nbytes]
                torch.frombuffer(staging.view(0, len(piece)), dtype=torch.uint8).copy_(piece)
                padded = -(-len(piece) // 4096) * 4096
                engine.write(path, at + start, staging.view(0, padded)).wait()
            span = FileSpan(path=path, offset=at, nbytes=len(raw))
            found[name] = TensorSource(shape=tuple(value.shape), dtype=dtype, spans=(span,), skew=0)
            at += -(-len(raw) // 4096) * 4096
    finally:
        engine.close()
        staging.close()
    return found


def read_tensor(engine: DiskEngine, source: TensorSource, dtype: str | None = None) -> torch.Tensor:
    """A whole tensor in fresh memory, cast on the way if asked."""
    target = dtype or source.dtype
    found = torch.empty(source.shape, dtype=torch_dtype(target))
    if source.nbytes == 0:
        return found
    raw = found.view(-1).view(torch.uint8).numpy().data.cast("B")
    engine.read([], bounces_of(source, target), raw).wait()
    return found


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
