"""Carries out `penstock plan --train`: a step of fine-tuning on a machine, before anything is loaded. Imported late."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from ..budget import MemoryBudget, parse_budget
from ..memory.errors import DoesNotFitError
from ..runtime.advice import ENOUGH, WORTH, Advice, Change, advise, smallest_that_fits
from ..runtime.foresight import Foresight, Room
from ..runtime.training.forecast import TrainingForesight
from ..runtime.training.foreseen import Adapters, TrainingForecast, TrainingWork
from ..runtime.training.optimizers import SGD, AdamW, Lion, OptimizerChoice
from ..runtime.training.run import Activations
from ..scheduler.hardware import Hardware
from ..scheduler.sizes import DEFAULT_CONTEXT
from .finetune_request import OPTIMIZERS
from .forecast import folder_of
from .lora_option import LoraOption
from .machines import find_machine, known_machines
from .output import Output
from .plan_request import PlanRequest
from .ranking import parse_target, rank, show_ranking
from .sweep import parse_sweep, show_sweep, sweep
from .training_view import VIEW, TrainingOutlook, show

_KINDS: Final[dict[str, type[OptimizerChoice]]] = {kind.mathematics: kind for kind in (AdamW, SGD, Lion)}
_ACTIVATIONS: Final[dict[bool | None, Activations]] = {None: "auto", True: "recompute", False: "keep"}
"""By --recompute."""
_ACCUMULATED: Final = 4
"""Times as many backward passes, as a change that is foreseen."""


def plan_training(request: PlanRequest, output: Output) -> int:
    """Foresee and print; the exit code.

    Raises:
        DoesNotFitError: it does not fit; the message says what is the smallest change with which it does.
        UsageError: an option has no meaning, or the model cannot be foreseen.
    """
    answer, where, source = request.answer, request.where, request.source
    budget = parse_budget(where.max_memory)
    asked = None if answer.sweep is None else parse_sweep(answer.sweep)
    with output.busy("building the model without its weights"):
        forecaster = TrainingForecaster(
            source, work_of(request), dtype=request.dtype, trust_remote_code=request.trust_remote_code
        )
        target = None
        if answer.target is not None:
            target = parse_target(answer.target, tokens_per_step=forecaster.work.tokens)
            ranking = rank(forecaster.on, known_machines(), target)
        else:
            machine = find_machine(where.hardware, device=where.device, disk=where.disk, output=output)
            if asked is not None:
                points = sweep(forecaster.on, machine, budget, asked)
            else:
                outlook = forecaster.outlook(machine, budget)
    if target is not None:
        return show_ranking(output, ranking, target, VIEW, as_json=answer.as_json)
    if asked is not None:
        title = f"training {source} on {machine.name}: {asked.name}"
        return show_sweep(
            output, asked, points, VIEW, title=title, chart=answer.chart, force=answer.force, as_json=answer.as_json
        )
    show(output, outlook, forecaster.name, as_json=answer.as_json)
    return 0


def work_of(request: PlanRequest) -> TrainingWork:
    """What a step of training consists of, as it was asked for."""
    options = request.training
    given = options.adapters()
    clip = None if options.clip is False else 1.0
    return TrainingWork(
        choice=_KINDS[options.optimizer](max_grad_norm=clip, **OPTIMIZERS[options.optimizer]),
        batch=request.run.batch or 1,
        context=options.context or DEFAULT_CONTEXT,
        accumulate=options.accumulate or 1,
        updates="backward" if options.updates == "backward" else "step",
        activations=_ACTIVATIONS[options.recompute],
        adapters=None if given is None else adapters_of(given),
    )


def adapters_of(given: LoraOption) -> Adapters:
    """What of adapters matters for what they take."""
    return Adapters(rank=given.r, targets=given.names, dropout=given.dropout)


@dataclass(kw_only=True, slots=True)
class _Tried:
    """A change of how is trained, and what comes of it."""

    words: str
    work: TrainingWork


class TrainingForecaster:
    """One model and one way to train it, on any machine."""

    def __init__(self, checkpoint: str, work: TrainingWork, *, dtype: str, trust_remote_code: bool) -> None:
        foresight = Foresight(folder_of(checkpoint), dtype=dtype, trust_remote_code=trust_remote_code)
        self._training = TrainingForesight(
            foresight, dtype=dtype, trust_remote_code=trust_remote_code, adapters=work.adapters
        )
        self.work = self._training.with_context(work)

    @cached_property
    def name(self) -> str:
        """The model, in some words."""
        model = self._training.foresight.model
        parameters = sum(parameter.numel() for parameter in model.parameters())
        dtype = str(model.dtype).removeprefix("torch.")
        return f"{type(model).__name__}, {parameters / 1e9:.3g} billion parameters in {dtype}"

    def on(self, hardware: Hardware, budget: MemoryBudget | None = None, batch: int | None = None) -> TrainingForecast:
        """A step on a machine.

        Raises:
            DoesNotFitError: it does not fit.
        """
        return self._with(replace(self.work, batch=batch or self.work.batch), hardware, budget)

    def _with(self, work: TrainingWork, hardware: Hardware, budget: MemoryBudget | None) -> TrainingForecast:
        room = None if budget is None else Room(host=budget.host, device=budget.device)
        return self._training.forecast(hardware, work, room=room)

    def outlook(self, hardware: Hardware, budget: MemoryBudget) -> TrainingOutlook:
        """A step on a machine, and the change that would help most.

        Raises:
            DoesNotFitError: it does not fit; the message says what is the smallest change with which it does.
        """
        named = budget.host is not None or budget.device is not None
        try:
            found = self.on(hardware, budget)
        except DoesNotFitError as error:
            raise self._with_remedy(error, hardware, budget, named=named) from None
        best = self._own_advice(found, budget)
        if not named:  # of a budget that was named the machine may have more
            bought = advise(found, lambda other: self._with(found.work, other, None))
            best = max((each for each in (best, bought) if each is not None), key=lambda a: a.speedup, default=None)
        return TrainingOutlook(forecast=found, advice=best, budget=budget)

    def _own_advice(self, found: TrainingForecast, budget: MemoryBudget) -> Advice | None:
        """The change of how is trained that would give most tokens per second."""
        tried = []
        for each in self._changes(found):
            try:
                other = self._with(each.work, found.hardware, budget)
            except DoesNotFitError:
                continue
            change = Change(words=each.words, hardware=found.hardware)
            tried.append(Advice(change=change, speedup=other.tokens_per_s / found.tokens_per_s))
        best = max((each.speedup for each in tried), default=0.0)
        if best < WORTH:
            return None
        return next(each for each in tried if each.speedup - 1 >= ENOUGH * (best - 1))

    def _changes(self, found: TrainingForecast) -> Iterator[_Tried]:
        work = found.work
        if work.updates == "step" and not work.clips and work.adapters is None:
            yield _Tried(words="--updates backward", work=replace(work, updates="backward"))
        if found.recompute:
            yield _Tried(words="--no-recompute", work=replace(work, activations="keep"))
        times = _ACCUMULATED * work.accumulate
        yield _Tried(words=f"--accumulate {times} (larger steps)", work=replace(work, accumulate=times))

    def _with_remedy(
        self, error: DoesNotFitError, hardware: Hardware, budget: MemoryBudget, *, named: bool
    ) -> DoesNotFitError:
        remedies = []
        if (smaller := self._smaller_batch(hardware, budget)) is not None:
            remedies.append(f"--batch {smaller}")
        elif self.work.adapters is None and self._with_adapters_fits(hardware, budget):
            remedies.append("--lora r=16")
        if not named and (bought := smallest_that_fits(hardware, lambda other: self.on(other))) is not None:
            remedies.append(bought[0].words)
        if not remedies:
            return error
        return DoesNotFitError(
            f"{error}; {' or '.join(remedies)} would make it fit",
            tier=error.tier,
            needed_nbytes=error.needed_nbytes,
            available_nbytes=error.available_nbytes,
        )

    def _smaller_batch(self, hardware: Hardware, budget: MemoryBudget) -> int | None:
        """The largest batch that fits, halving."""
        batch = self.work.batch // 2
        while batch:
            try:
                self.on(hardware, budget, batch)
            except DoesNotFitError:
                batch //= 2
            else:
                return batch
        return None

    def _with_adapters_fits(self, hardware: Hardware, budget: MemoryBudget) -> bool:
        adapters = Adapters(rank=16)
        training = self._training.with_adapters(adapters)
        try:
            training.forecast(
                hardware,
                replace(self.work, adapters=adapters),
                room=Room(host=budget.host, device=budget.device),
            )
        except DoesNotFitError:
            return False
        return True
