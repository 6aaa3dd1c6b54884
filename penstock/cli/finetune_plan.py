"""What a fine-tuning run will do to the machine, in lines for people and as a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..memory.store import stats
from ..runtime.training.data.sequences import DataStatistics
from ..runtime.training.facade import StreamedOptimizer
from ..runtime.training.foreseen import TrainingForecast
from ..runtime.training.runfolder import RunFolder
from ..runtime.training.wear import Wear
from ..sizes import format_size
from .finetune_job import Job
from .finetune_request import FinetuneRequest

_MOST_PATTERNS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetunePlan:
    """What is trained, and what is written. All sizes in bytes."""

    parameters: int
    """That are trained, counted as numbers."""
    tensors: int
    undecayed: Sequence[str]
    """Patterns of those without weight decay."""
    steps: int
    done: int
    """Of the steps, before this."""
    sequences_per_step: int
    seq: int
    epochs: float
    states_nbytes: int
    """On disk for as long as the run is kept: every state twice, so that the last commit stays whole."""
    step_written_nbytes: int
    """By each step: states, weights and gradients that do not stay in memory. Of adapters, nothing."""
    commit_written_nbytes: int
    """By each commit: states that stay in memory."""
    activations_written_nbytes: int | None
    """By each step, of activations; None where a first forward has to show it."""
    written_nbytes: int
    """By the steps that are left, and their commits: that is the wear of the drive."""


def finetune_plan(request: FinetuneRequest, job: Job, run: RunFolder, optimizer: StreamedOptimizer) -> FinetunePlan:
    """The plan of a run whose model is there."""
    trained = optimizer.training.trained
    return _plan(
        request,
        job,
        optimizer.training.wear(),
        parameters=sum(each.elements for each in trained),
        tensors=len(trained),
        states_nbytes=stats(run.states).file_nbytes,
    )


def foreseen_plan(request: FinetuneRequest, job: Job, found: TrainingForecast) -> FinetunePlan:
    """The plan of a run that has not been prepared."""
    return _plan(
        request, job, found.wear, parameters=found.trained, tensors=found.tensors, states_nbytes=found.disk_nbytes
    )


def _plan(request: FinetuneRequest, job: Job, wear: Wear, **sizes: int) -> FinetunePlan:
    sequences = request.recipe.batch * request.recipe.accumulate
    return FinetunePlan(
        undecayed=tuple(job.choice.groups or ()),
        steps=job.schedule.steps,
        done=job.step,
        sequences_per_step=sequences,
        seq=job.data.training.seq,
        epochs=job.schedule.steps * sequences / len(job.data.training),
        step_written_nbytes=wear.step_nbytes,
        commit_written_nbytes=wear.commit_nbytes,
        activations_written_nbytes=wear.activations_nbytes,
        written_nbytes=wear.nbytes(done=job.step, steps=job.schedule.steps, commit_every=request.commit_every),
        **sizes,
    )


def _of_activations(nbytes: int | None) -> str:
    if nbytes is None:
        return ", beside activations that a plan may send there once a first forward has shown what there is"
    return f", {format_size(nbytes)} of each step activations" if nbytes else ""


def plan_lines(plan: FinetunePlan, request: FinetuneRequest, training: DataStatistics, aside: int) -> list[str]:
    """The plan for people.

    Args:
        plan: Of the run.
        request: What was asked.
        training: Of the data.
        aside: Documents for evaluation.
    """
    recipe = request.recipe
    hyper = ", ".join(f"{name} {value}" for name, value in recipe.hyperparameters().items())
    data = f"data: {training.documents:,} documents, {training.tokens:,} tokens in {training.sequences:,} sequences of "
    data += f"{plan.seq} ({training.padding / max(training.sequences * plan.seq, 1):.1%} padding)"
    for count, what in ((training.truncated, "truncated"), (training.left_out, "left out"), (aside, "for evaluation")):
        data += f"; {count:,} {what}" if count else ""
    each = {"step": plan.step_written_nbytes, "commit": plan.commit_written_nbytes}
    parts = [f"{format_size(nbytes)} written per {what}" for what, nbytes in each.items() if nbytes]
    lines = [
        f"trains {plan.parameters:,} parameters in {plan.tensors} tensors with {recipe.optimizer} ({hyper}), "
        + (f"clipped to {recipe.clip:g}" if recipe.clip else "not clipped"),
        data,
        f"{plan.steps} steps of {recipe.accumulate} × {recipe.batch} sequences, {plan.epochs:.2f} epochs; "
        f"{_schedule(request, plan)}",
        f"disk: {format_size(plan.states_nbytes)} in {request.out} for states; {' and '.join(parts)}, "
        f"{format_size(plan.written_nbytes)} in all" + _of_activations(plan.activations_written_nbytes),
    ]
    if recipe.lora is not None:
        lines.insert(1, f"adapters: {recipe.lora}; the model's own weights are only read")
    if plan.undecayed:
        more = len(plan.undecayed) - _MOST_PATTERNS
        listed = ", ".join(plan.undecayed[:_MOST_PATTERNS]) + (f" and {more} more patterns" if more > 0 else "")
        lines.insert(1, f"no weight decay for {listed}")
    if plan.done:
        lines.append(f"{plan.done} steps are done: going on behind them")
    return lines


def _schedule(request: FinetuneRequest, plan: FinetunePlan) -> str:
    recipe = request.recipe
    warmup = recipe.warmup_steps(plan.steps)
    return f"{recipe.schedule} learning rate" + (f" after {warmup} steps of warm-up" if warmup else "")
