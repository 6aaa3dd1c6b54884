"""A forecast of training for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from rich.text import Text

from ..budget import MemoryBudget
from ..runtime.advice import Advice
from ..runtime.training.forecast import STANDARD_NBYTES, TrainingForecast
from ..scheduler.hardware import Hardware
from ..scheduler.stepload import Home, LoadedBlock, StepPrediction
from ..sizes import format_size
from .forecast import seconds_text
from .output import Output
from .tables import lines_of
from .view import View

TB: Final = 1e12
_TIERS: Final[tuple[Home, ...]] = ("device", "host", "disk")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOutlook:
    """A forecast, and what would improve it."""

    forecast: TrainingForecast
    advice: Advice | None
    clips: bool
    budget: MemoryBudget


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Bytes of one tier."""

    weights: int
    gradients: int
    states: int
    """Masters and the optimizer's own; on disk twice, as the last commit has them and as they are now."""
    activations: int
    total: int
    """With rings, and what passes through."""
    read: float
    """Per step; of a device: what is copied to it."""
    written: float


def show(output: Output, outlook: TrainingOutlook, name: str, *, as_json: bool) -> None:
    """Print an outlook."""
    if as_json:
        output.write_json(document(outlook.forecast, outlook.advice))
        return
    output.data.print(Text(_title(outlook, name), style="bold"))
    for line in render(outlook):
        output.data.print(line)


def _title(outlook: TrainingOutlook, name: str) -> str:
    found = outlook.forecast
    work, adapters = found.work, found.work.adapters
    what = "all weights" if adapters is None else f"adapters of rank {adapters.rank}"
    clipped = "clipped" if outlook.clips else "not clipped"
    return (
        f"{name}, on {found.hardware.name}: training {what} with {work.choice.mathematics}, {clipped}, "
        f"{work.accumulate} × {work.batch} sequences of {work.context} tokens per step"
    )


def held(found: TrainingForecast, tier: Home) -> Held:
    """What a tier holds, and what a step moves from and to it."""
    trained, traffic = found.load.trained(), found.prediction.traffic
    on_cpu = not found.load.separate
    computes = tier == ("host" if on_cpu else "device")
    weights, activations = found.load.held_nbytes(tier), found.activations_nbytes if computes else 0
    if tier == "device":
        return Held(
            weights=weights, gradients=0, states=0, activations=activations,
            total=found.plan.device_nbytes + activations, read=traffic.to_device, written=traffic.from_device,
        )  # fmt: skip

    def gradients(block: LoadedBlock) -> bool:
        waits = found.work.updates == "step" or found.work.accumulate > 1  # else they are gone with their updates
        return block.spilled == (tier == "disk") and (tier == "disk" or waits)

    kept = sum(block.kept_nbytes for block in trained if gradients(block))
    if tier == "disk":
        return Held(
            weights=weights, gradients=kept, states=found.disk_nbytes, activations=0,
            total=found.disk_nbytes + found.scratch_nbytes, read=traffic.read, written=traffic.written,
        )  # fmt: skip
    states = sum(block.states_nbytes for block in trained if block.states_in_memory)
    return Held(
        weights=weights, gradients=kept, states=states, activations=activations,
        total=found.plan.host_nbytes + activations, read=0, written=0,
    )  # fmt: skip


def render(outlook: TrainingOutlook) -> Iterator[Text]:
    """An outlook as lines for people."""
    found = outlook.forecast
    step = found.prediction
    rows = [
        ["tier", "weights", "gradients", "masters, states", "activations", "all", "has", "read/step", "written/step"]
    ]
    for tier in _TIERS if found.load.separate else _TIERS[1:]:
        each = held(found, tier)
        figures = (each.weights, each.gradients, each.states, each.activations, each.total)
        has = memory_of(found.hardware, tier)
        cells = [_size(nbytes) for nbytes in (*figures, has, each.read, each.written)]
        rows.append([tier, *cells])
    yield from lines_of(rows)
    yield Text(_pace(found), style="bold")
    busy = sorted(step.busy_s.items(), key=lambda item: -item[1])
    yield Text(f"bound by the {found.binds}: per step {', '.join(f'{name} {seconds_text(s)}' for name, s in busy)}")
    yield Text(_moved(found))
    yield Text(_wear(found))
    yield Text(_before(found))
    if found.recompute:
        yield Text("activations of layers are made again in backward")
    if outlook.advice is not None:
        yield Text(str(outlook.advice), style="bold")
    for note in (*found.notes, *found.plan.notes):
        yield Text(note)
    yield Text(_as_budget(found))


def _pace(found: TrainingForecast) -> str:
    step = found.prediction
    label = "emulated: " if found.hardware.emulated else ""
    return (
        f"{label}{seconds_text(step.seconds)} per step, {found.tokens_per_s:,.3g} tokens/s: forward "
        f"{seconds_text(step.forward_s)}, backward {seconds_text(step.backward_s)}, update "
        f"{seconds_text(step.update_s)} before step() returns{_beside(found)}"
    )


def _beside(found: TrainingForecast) -> str:
    if found.work.updates == "backward":
        return ", the rest of it in backward"
    return ", the rest of it beside the next forward"


def _moved(found: TrainingForecast) -> str:
    traffic, count = found.prediction.traffic, max(found.trained, 1)
    parts = [
        f"{name} {_size(read)} and {_size(written)}"
        for name, read, written in (
            ("weights", traffic.weights_read, traffic.weights_written),
            ("gradients", traffic.gradients_read, traffic.gradients_written),
            ("masters and states", traffic.states_read, traffic.states_written),
        )
        if read or written
    ]
    if not parts:
        return "nothing is read from drives or written to them by a step"
    return (
        f"read and written per step: {', '.join(parts)}; per trained parameter {traffic.read / count:.3g} and "
        f"{traffic.written / count:.3g} bytes"
    )


def _wear(found: TrainingForecast) -> str:
    written, life = found.prediction.traffic.written, found.steps_in_life
    if life is None:
        return "wear of the drives: only commits write to them"
    known = found.endurance_nbytes
    of = f"the drives' {known / TB:,.0f} TBW" if known else f"{STANDARD_NBYTES / TB:,.0f} TBW, if that is the drive's,"
    return (
        f"wear of the drives: {format_size(round(written))} per step, {1000 * written / TB:.3g} TB per 1000 steps; "
        f"{of} are {life:,.0f} steps"
    )


def _before(found: TrainingForecast) -> str:
    return (
        f"before the first step {_size(found.disk_nbytes / 2)} of masters and states are written, "
        f"{seconds_text(found.begin_s)}"
    )


def _as_budget(found: TrainingForecast) -> str:
    budgets = [f"host={found.plan.host_budget_nbytes // 2**20}MiB"]
    if found.plan.device_budget_nbytes is not None:
        budgets.insert(0, f"device={found.plan.device_budget_nbytes // 2**20}MiB")
    return f"budgets: --max-memory {','.join(budgets)}; activations come on top of them"


def memory_of(hardware: Hardware, tier: Home) -> int:
    """What a machine has of a tier; 0 where that is not known."""
    if tier == "host":
        return hardware.host_nbytes
    if tier == "device":
        return hardware.gpu.memory_nbytes if hardware.gpu is not None else 0
    return sum(drive.capacity_nbytes for drive in hardware.drives)


def _size(nbytes: float) -> str:
    return format_size(round(nbytes)) if nbytes else "-"


def document(found: TrainingForecast, advice: Advice | None = None) -> dict[str, object]:
    """For --json. Sizes in bytes, times in seconds."""
    work, step = found.work, found.prediction
    traffic = step.traffic
    return {
        "hardware": found.hardware.name,
        "emulated": found.hardware.emulated,
        "price_usd": found.hardware.price_usd,
        "optimizer": work.choice.mathematics,
        "lora": None if work.adapters is None else {"r": work.adapters.rank, "targets": work.adapters.targets},
        "batch": work.batch,
        "context": work.context,
        "accumulate": work.accumulate,
        "updates": work.updates,
        "recompute": found.recompute,
        "trained_parameters": found.trained,
        **_seconds(step),
        "tokens_per_s": found.tokens_per_s,
        "binds": found.binds,
        "busy_s_per_step": dict(step.busy_s),
        "tiers": {tier: held(found, tier) for tier in (_TIERS if found.load.separate else _TIERS[1:])},
        "budgets": {"host": found.plan.host_budget_nbytes, "device": found.plan.device_budget_nbytes},
        "activations": found.activations,
        "read_nbytes_per_step": traffic.read,
        "written_nbytes_per_step": traffic.written,
        "traffic": traffic,
        "wear": {
            "written_tb_per_1000_steps": 1000 * traffic.written / TB,
            "endurance_nbytes": found.endurance_nbytes or None,
            "steps_until": found.steps_in_life,
            "steps_until_nbytes": found.endurance_nbytes or STANDARD_NBYTES,
        },
        "begin_s": found.begin_s,
        "advice": None if advice is None else {"change": advice.change.words, "speedup": advice.speedup},
        "notes": (*found.notes, *found.plan.notes),
    }


def _seconds(step: StepPrediction) -> dict[str, float]:
    return {
        "s_per_step": step.seconds,
        "forward_s": step.forward_s,
        "backward_s": step.backward_s,
        "update_s": step.update_s,
    }


VIEW: Final[View[TrainingForecast]] = View(
    columns=("tokens/s", "s/step", "read/step", "written/step", "bound by"),
    row=lambda found: [
        f"{found.tokens_per_s:.3g}",
        f"{found.seconds:.3g}",
        _size(found.prediction.traffic.read),
        _size(found.prediction.traffic.written),
        found.binds,
    ],
    short=2,
    document=document,
    rate="tokens/s of training",
)
