"""Carries out `penstock plan` for a run: what it would take on a machine. Imported late: torch takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.text import Text

from ..budget import MemoryBudget
from ..memory.errors import DoesNotFitError, UsageError
from ..runtime.advice import Advice, advise, smallest_that_fits
from ..runtime.explain import foreseen_text
from ..runtime.foresight import Forecast, Foresight, Room
from ..runtime.profiler.predicted import write_prediction
from ..scheduler.experts.forecast import ExpertForecast
from ..scheduler.experts.trace import Trace
from ..scheduler.hardware import Hardware
from ..scheduler.processors import GAIN
from ..scheduler.work import read_work
from ..sizes import format_size
from .output import Output
from .tables import lines_of
from .view import View

BATCHES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LANES: Final = 2
"""Micro-batches that alternate: as few as keep both processors busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerWork:
    """What is to be run."""

    prompt: int
    """Tokens."""
    generate: int
    """Tokens of each answer."""
    batch: int | None
    """Sequences at a time; None for as many as give the most tokens per second."""

    def __post_init__(self) -> None:
        for name, least in (("prompt", 1), ("generate", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} {getattr(self, name)} has no meaning: give {least} or more")


def work_of(file: Path) -> AnswerWork:
    """What a workload file asks for.

    Raises:
        UsageError: it cannot be used, or asks for training, for which there are options.
    """
    asked = read_work(file)
    if asked.kind == "finetune":
        raise UsageError(f"{file} asks for training: use --train adamw with --batch and --context instead of the file")
    batch = None if asked.kind == "batch" and asked.batch == 1 else asked.batch
    return AnswerWork(prompt=asked.prompt, generate=asked.generate, batch=batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """A forecast, and what would improve it."""

    forecast: Forecast
    advice: Advice | None


class Forecaster:
    """One model and one kind of work, on any machine."""

    def __init__(
        self,
        checkpoint: str,
        work: AnswerWork,
        *,
        dtype: str,
        trust_remote_code: bool,
        trace: Trace | None = None,
    ) -> None:
        self.work = work
        self._trace = trace
        self.foresight = Foresight(folder_of(checkpoint), dtype=dtype, trust_remote_code=trust_remote_code)

    def on(
        self, hardware: Hardware, budget: MemoryBudget | None = None, *, batch: int | None = None, lanes: int = 1
    ) -> Forecast:
        """The work on a machine; `batch` in so many micro-batches, else as many as give most tokens per second.

        Raises:
            DoesNotFitError: not even one sequence can be run.
        """
        room = Room(host=budget.host, device=budget.device) if budget is not None else None
        wanted = batch or self.work.batch

        def with_batch(size: int, lanes: int = 1) -> Forecast:
            return self.foresight.forecast(
                hardware,
                prompt=self.work.prompt,
                generated=self.work.generate,
                batch=size,
                room=room,
                lanes=lanes,
                trace=self._trace,
            )

        if wanted is not None:
            return with_batch(wanted, lanes)
        best = _fastest(with_batch)
        if hardware.gpu is None or best.plan.resident:
            return best
        for size in (max(best.batch, LANES), LANES * best.batch):
            best = _alternating(best, size, with_batch)
        return best

    def outlook(self, hardware: Hardware, budget: MemoryBudget | None = None) -> Outlook:
        """The work on a machine, and the change of it that would help most.

        Raises:
            DoesNotFitError: it cannot be run; the message says what is the smallest change with which it can.
        """
        try:
            found = self.on(hardware, budget)
        except DoesNotFitError as error:
            if budget is not None and (budget.host is not None or budget.device is not None):
                raise  # it says which budget to raise
            raise self._with_remedy(error, hardware) from None
        if budget is not None and (budget.host is not None or budget.device is not None):
            return Outlook(forecast=found, advice=None)  # the plan itself says what a larger budget would do
        return Outlook(
            forecast=found, advice=advise(found, lambda other: self.on(other, batch=found.batch, lanes=found.lanes))
        )

    def _with_remedy(self, error: DoesNotFitError, hardware: Hardware) -> DoesNotFitError:
        remedy = smallest_that_fits(hardware, lambda other: self.on(other))
        smaller = "a smaller --batch or --prompt" if remedy is None else f"{remedy[0].words} would make it fit"
        return DoesNotFitError(
            f"{error}; {smaller}",
            tier=error.tier,
            needed_nbytes=error.needed_nbytes,
            available_nbytes=error.available_nbytes,
        )


def folder_of(checkpoint: str) -> str:
    """The folder of a config.json that is named itself."""
    file = Path(checkpoint)
    if not file.is_file():
        return checkpoint
    if file.name != "config.json":
        raise UsageError(f"{checkpoint}: name a folder with a config.json, or a file of that name")
    return str(file.parent)


def _fastest(with_batch: Callable[[int], Forecast]) -> Forecast:
    """The batch that gives the most tokens per second: larger ones until that falls, or they do not fit."""
    best = with_batch(BATCHES[0])
    for size in BATCHES[1:]:
        try:
            found = with_batch(size)
        except DoesNotFitError:
            break
        if found.tokens_per_s < best.tokens_per_s:
            break
        best = found
    return best


def _alternating(one: Forecast, size: int, with_batch: Callable[[int, int], Forecast]) -> Forecast:
    """A batch in micro-batches that alternate between two processors, where that is worth it: results are then equal to
    rounding only."""
    try:
        two = with_batch(size, LANES)
    except DoesNotFitError:
        return one
    gain = 0.0 if one.lanes > 1 else GAIN
    return two if two.cpu_share and two.tokens_per_s * (1 - gain) >= one.tokens_per_s else one


def show(output: Output, outlook: Outlook, *, title: str, as_json: bool, profile: Path | None, force: bool) -> None:
    """Print an outlook, and write its profile where one is asked for."""
    if profile is not None:
        write_prediction(profile, outlook.forecast, force=force)
    if as_json:
        output.write_json(document(outlook))
        return
    output.data.print(Text(title, style="bold"))
    for line in render(outlook):
        output.data.print(line)
    if profile is not None:
        output.notes.print(Text(f"the predicted run is in {profile}: open it with penstock prof report"))


def title_of(foresight: Foresight, forecast: Forecast) -> str:
    """What is foreseen, in a line."""
    parameters = sum(parameter.numel() for parameter in foresight.model.parameters())
    dtype = str(foresight.model.dtype).removeprefix("torch.")
    work = f"prompt {forecast.prompt}, answer {forecast.generated} tokens, batch {forecast.batch}"
    name = type(foresight.model).__name__
    return f"{name}, {parameters / 1e9:.3g} billion parameters in {dtype}, on {forecast.hardware.name}: {work}"


def render(outlook: Outlook) -> Iterator[Text]:
    """An outlook as lines for people."""
    found, plan = outlook.forecast, outlook.forecast.plan
    rows = [["tier", "weights", "all", "budget", "moved per token"]]
    moved = {"device": plan.link_nbytes_per_sweep, "host": 0, "disk": plan.disk_nbytes_per_sweep}
    held = {"device": plan.device_nbytes, "host": plan.host_nbytes, "disk": 0}
    budgets = {"device": plan.device_budget_nbytes, "host": plan.host_budget_nbytes, "disk": None}
    for tier in ("device", "host", "disk"):
        if tier == "device" and plan.device_budget_nbytes is None:
            continue
        figures = (plan.home_nbytes(tier), held[tier], budgets[tier], moved[tier])
        rows.append([tier, *(format_size(nbytes) if nbytes else "-" for nbytes in figures)])
    yield from lines_of(rows)
    label = "emulated: " if found.hardware.emulated else ""
    yield Text(
        f"{label}first token after {seconds_text(found.first_token_s)}, then {seconds_text(found.token_s)} per token; "
        f"{found.tokens_per_s:.3g} tokens/s over the answer"
    )
    busy = sorted(found.busy_s.items(), key=lambda item: -item[1])
    yield Text(f"bound by the {found.binds}: per token {', '.join(f'{name} {seconds_text(s)}' for name, s in busy)}")
    if found.experts is not None:
        yield Text(foreseen_text(found.experts))
    yield Text(f"besides weights it takes {format_size(found.headroom_nbytes)} (keys and values, activations, logits)")
    if outlook.advice is not None:
        yield Text(str(outlook.advice), style="bold")
    elif plan.suggestion():
        yield Text(plan.suggestion() or "")
    for note in plan.notes:
        yield Text(note)


def document(outlook: Outlook) -> dict[str, object]:
    """An outlook for programs."""
    found, plan = outlook.forecast, outlook.forecast.plan
    return {
        "hardware": found.hardware.name,
        "emulated": found.hardware.emulated,
        "price_usd": found.hardware.price_usd,
        "prompt": found.prompt,
        "generate": found.generated,
        "batch": found.batch,
        "lanes": found.lanes,
        "cpu_share": found.cpu_share,
        "first_token_s": found.first_token_s,
        "token_s": found.token_s,
        "tokens_per_s": found.tokens_per_s,
        "answer_s": found.answer_s,
        "binds": found.binds,
        "busy_s_per_token": dict(found.busy_s),
        "resident": plan.resident,
        "weights_nbytes": {tier: plan.home_nbytes(tier) for tier in ("device", "host", "disk")},
        "device_nbytes": plan.device_nbytes,
        "host_nbytes": plan.host_nbytes,
        "headroom_nbytes": found.headroom_nbytes,
        "disk_nbytes_per_token": plan.disk_nbytes_per_sweep,
        "link_nbytes_per_token": plan.link_nbytes_per_sweep,
        "experts": None if found.experts is None else _experts(found.experts),
        "advice": None
        if outlook.advice is None
        else {"change": outlook.advice.change.words, "speedup": outlook.advice.speedup},
        "notes": plan.notes,
    }


def _experts(found: ExpertForecast) -> dict[str, object]:
    """What is foreseen of experts, per step, for programs."""
    return {
        "assumed": found.assumed,
        "source": found.source,
        "uses": found.uses,
        "hits": dict(found.hits),
        "misses": dict(found.misses),
        "hit_rate": found.hit_rate,
        "read_nbytes": found.read_nbytes,
        "copied_nbytes": found.copied_nbytes,
        "computed_by_cpu": found.computed_by_cpu,
        "waiting_s": found.waiting_s,
    }


VIEW: Final[View[Forecast]] = View(
    columns=("tokens/s", "s/token", "first token", "read per token", "bound by"),
    row=lambda found: _row(found),
    short=2,
    document=lambda found: document(Outlook(forecast=found, advice=None)),
    rate="tokens/s over the answer",
)


def _row(found: Forecast) -> list[str]:
    read = found.plan.disk_nbytes_per_sweep
    figures = [f"{found.tokens_per_s:.3g}", f"{found.token_s:.3g}", f"{found.first_token_s:.3g} s"]
    return [*figures, format_size(read) if read else "-", found.binds]


def seconds_text(value: float) -> str:
    """A time for people."""
    return f"{value:.3g} s" if value >= 0.1 else f"{value * 1e3:.3g} ms"
