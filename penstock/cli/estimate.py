"""Carries out `penstock plan --sizes`. Imported late: torch takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from rich.text import Text

from ..budget import MemoryBudget
from ..memory.capacity import disk_capacity, host_capacity
from ..memory.errors import DoesNotFitError, UsageError
from ..memory.scratch import default_root
from ..runtime.sizing import measure_sizes
from ..scheduler.fitting import Alternative, Fitting, Room, fitting
from ..scheduler.sizes import KINDS, Kind, Sizes, Workload
from ..sizes import format_size
from .output import Output
from .tables import lines_of

_NAMES: Final[dict[Kind, str]] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "kv": "KV cache",
    "workspace": "workspace",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What was worked out."""

    sizes: Sizes
    fitting: Fitting


def estimate(
    checkpoint: str,
    *,
    workload: Workload,
    dtype: str,
    budget: MemoryBudget,
    device: str,
    disk: Path | None,
    trust_remote_code: bool,
) -> Estimate:
    """Measure the model under the workload, and place it on the machine, or on the one that the budget describes.

    Raises:
        CheckpointError: the config cannot be used.
        UsageError: an option has no meaning here.
    """
    rooms = find_rooms(budget, device=device, disk=disk)

    def measured(work: Workload, kind: str) -> Sizes:
        on_cpu = rooms[0].tier == "host"
        return measure_sizes(checkpoint, workload=work, dtype=kind, on_cpu=on_cpu, trust_remote_code=trust_remote_code)

    sizes = measured(workload, dtype)

    def alternatives() -> Iterator[Alternative]:
        if sizes.checkpointed is not None:
            checkpointing = replace(sizes, peak=sizes.checkpointed)
            yield Alternative(change="activation checkpointing", sizes=checkpointing)
        asked = [("--batch 1", replace(workload, batch=1), dtype)] if workload.batch > 1 else []
        if sizes.dtype == "float32":
            asked.append(("--dtype bfloat16", workload, "bfloat16"))
        if workload.train == "adamw":
            asked.append(("--train lora", replace(workload, train="lora"), dtype))
        for change, work, kind in asked:
            yield Alternative(change=change, sizes=measured(work, kind))

    return Estimate(sizes=sizes, fitting=fitting(sizes, rooms, alternatives()))


def find_rooms(budget: MemoryBudget, *, device: str, disk: Path | None) -> list[Room]:
    """What each tier can give: the budget where it names the tier, else what is free now. The first computes.

    Raises:
        UsageError: the device is unknown, or not there and has no budget.
    """
    rooms = []
    on_device = _device_nbytes(budget, device)
    if on_device is not None:
        rooms.append(Room(tier="device", nbytes=on_device, source=_source(budget.device)))
    host = budget.host if budget.host is not None else host_capacity().available_nbytes
    rooms.append(Room(tier="host", nbytes=host, source=_source(budget.host)))
    free = budget.disk
    if free is None:
        free = disk_capacity(disk or default_root()).free_nbytes
    rooms.append(Room(tier="disk", nbytes=free, source=_source(budget.disk)))
    return rooms


def _source(asked: int | None) -> str:
    return "free now" if asked is None else "--max-memory"


def _device_nbytes(budget: MemoryBudget, device: str) -> int | None:
    """Memory of a device apart from the host; None where there is none."""
    name, _, index = device.partition(":")
    if name not in ("auto", "cpu", "cuda") or (index and not (name == "cuda" and index.isdecimal())):
        raise UsageError(f"unknown device {device!r}: use auto, cpu, cuda or cuda:N")
    if name == "cpu" or budget.device is not None:
        return None if name == "cpu" else budget.device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) < count:
        free, _ = torch.cuda.mem_get_info(int(index or 0))
        return int(free)
    if name == "cuda":
        raise UsageError(
            f"device {device!r} is not in this machine: say what it has, for example --max-memory device=24GiB"
        )
    return None


def show(output: Output, found: Estimate, *, top: int, as_json: bool) -> int:
    """Print an estimate; 0.

    Raises:
        DoesNotFitError: it does not fit, after it was printed.
    """
    sizes, placed = found.sizes, found.fitting
    if as_json:
        output.write_json(_document(found))
    else:
        for line in render(found, top=top):
            output.data.print(line)
    if placed.verdict == "too large":
        raise _too_large(sizes, placed)
    return 0


def render(found: Estimate, *, top: int) -> list[Text]:
    """The estimate as lines for people."""
    sizes, placed = found.sizes, found.fitting
    lines = [Text(_title(sizes), style="bold"), Text()]
    header = ["", "at most", "at the peak", *(share.tier for share in placed.shares)]
    rows = [
        [
            _NAMES[kind],
            *(_size(getattr(each, kind)) for each in (sizes.most, sizes.peak, *(s.held for s in placed.shares))),
        ]
        for kind in KINDS
        if getattr(sizes.most, kind) or getattr(sizes.peak, kind)
    ]
    totals = [_size(share.held.total) for share in placed.shares]
    rows.append(["total", "", format_size(sizes.peak.total), *totals])
    rows.append(["room", "", "", *(format_size(share.room_nbytes) for share in placed.shares)])
    lines += lines_of([header, *rows])
    lines += [Text(), *lines_of([_MODULE_HEADER, *_module_rows(sizes, top)])]
    return [*lines, Text(), *(Text(line) for line in _sentences(sizes, placed))]


_MODULE_HEADER: Final = ["largest modules", "count", "weights", "gradients", "optimizer", "activations", "KV cache"]


def _module_rows(sizes: Sizes, top: int) -> Iterator[list[str]]:
    total = sum(each.total for each in sizes.modules)
    for each in [each for each in sizes.modules if each.total * 10_000 > total][:top]:
        figures = (each.weights, each.gradients, each.optimizer, each.activations, each.kv)
        yield [each.path, str(each.count), *(_size(nbytes) for nbytes in figures)]


def _title(sizes: Sizes) -> str:
    work = sizes.workload
    tune = {None: "inference", "adamw": "training all weights with AdamW", "lora": f"LoRA of rank {work.rank}"}
    return (
        f"{sizes.architecture}, {sizes.parameters / 1e9:.3g} billion parameters in {sizes.dtype}: {tune[work.train]}, "
        f"batch {work.batch}, context {work.context}"
    )


def _sentences(sizes: Sizes, placed: Fitting) -> Iterator[str]:
    first = placed.shares[0]
    of = f"{format_size(sizes.peak.total)} of {format_size(first.room_nbytes)} ({first.room_source})"
    if placed.verdict == "resident":
        yield f"fits: everything is resident on the {first.tier}, {of}"
    elif placed.verdict == "streamed":
        below = ", ".join(f"{format_size(s.held.total)} on the {s.tier}" for s in placed.shares[1:] if s.held.total)
        yield f"fits when streamed: {below}, brought to the {first.tier} when it is used"
    if sizes.checkpointed is not None:
        yield f"with activation checkpointing: {format_size(sizes.checkpointed.total)} at the peak"
    if placed.suggestion is not None and placed.verdict != "too large":
        yield placed.suggestion
    yield "tensors only: interpreter, libraries and kernels' own buffers come on top"
    yield from sizes.notes


def _too_large(sizes: Sizes, placed: Fitting) -> DoesNotFitError:
    first = placed.shares[0]
    if placed.needed_nbytes > first.room_nbytes:
        what = f"{format_size(placed.needed_nbytes)} of the {first.tier}, which has {format_size(first.room_nbytes)}"
    else:
        what = f"{format_size(placed.missing_nbytes)} more than all tiers together can give"
    return DoesNotFitError(
        f"{sizes.model}: does not fit even when streamed: it needs {what}; {placed.suggestion}",
        tier=first.tier,
        needed_nbytes=placed.needed_nbytes,
        available_nbytes=first.room_nbytes,
        resident_nbytes=sizes.peak.total,
    )


def _size(nbytes: int) -> str:
    return format_size(nbytes) if nbytes else "-"


def _document(found: Estimate) -> dict[str, object]:
    sizes = found.sizes
    fields = {name: getattr(sizes, name) for name in sizes.__dataclass_fields__}
    return {
        **fields,
        "total_nbytes": sizes.peak.total,
        "fitting": found.fitting,
    }
