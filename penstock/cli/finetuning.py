"""Carries out `penstock finetune`. Imported late: torch and transformers take seconds."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text
from transformers.utils import logging as transformers_logging

from ..api import close, explain
from ..caches import link_cache
from ..memory.errors import DiskError, PenstockError
from ..runtime.training.adapters import without_adapters
from ..runtime.training.board import open_board
from ..runtime.training.distance import Distance, distance_of, rates_of
from ..runtime.training.evaluation import takes_positions
from ..runtime.training.facade import StreamedOptimizer
from ..runtime.training.foreseen import TrainingForecast
from ..runtime.training.loop import Loop, LoopOptions
from ..runtime.training.metrics import MetricsFile, StepRecord, read_metrics
from ..runtime.training.progress import Progress
from ..runtime.training.runfolder import RunFolder
from ..sizes import format_size
from .finetune_job import Job, make_ready
from .finetune_outlook import dry_run, foresee, outlook_lines, room_of
from .finetune_plan import FinetunePlan, finetune_plan, plan_lines
from .finetune_progress import STEADY, FinetuneProgress, duration
from .finetune_request import FinetuneRequest
from .generation import plan_summary
from .losschart import draw_loss, loss_curve
from .machines import kept_machine
from .output import Output
from .stopsignals import OK, StopSignals
from .training_view import document

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Reached:
    """What this process has done of a run."""

    steps: int = 0
    """Taken here."""
    tokens: int = 0
    seconds: float = 0.0
    """In these steps: without evaluation and commits."""
    total_s: float = 0.0
    """With them, from the first step on."""
    last: StepRecord | None = None
    eval_loss: float | None = None
    """The newest."""
    steady: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=STEADY))
    """The last ones: the first of a process are slow, while orders are learnt."""

    def __call__(self, record: StepRecord) -> None:
        """One more step is done."""
        self.steps += 1
        self.tokens += record.tokens
        self.seconds += record.seconds
        self.last = record
        self.steady.append(record)
        self.eval_loss = self.eval_loss if record.eval_loss is None else record.eval_loss


def carry_out(request: FinetuneRequest, output: Output) -> int:
    """Look at checkpoint and data, load, tell the plan, train, tell what was reached. Returns the exit code."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it advises on arguments of its own
    if request.dry_run:
        return dry_run(request, output)
    with RunFolder(request.out, resume=request.resume, force=request.force) as run:
        found = None if run.state is None else Progress.from_json(run.state.extra)
        if request.resume and found is None:
            output.notes.print(Text(f"{request.out} holds no commit to go on from: starting afresh"))
        job = make_ready(request, run.data, found, output)
        if job.step >= job.schedule.steps:
            output.notes.print(Text(f"{request.out}: all {job.schedule.steps} steps are done already"))
            if request.as_json:
                output.write_json({"run": os.fspath(request.out), "step": job.step, "steps": job.schedule.steps})
            return OK
        if not job.goes_on:
            run.forget_steps()  # before the states go: steps without states would look like a loss
        with output.busy("loading"):
            model, optimizer = job.start(request)
        try:
            return _train(request, job, run, model, optimizer, output)
        finally:
            close(model)


def _train(
    request: FinetuneRequest, job: Job, run: RunFolder, model: Any, optimizer: StreamedOptimizer, output: Output
) -> int:
    plan = finetune_plan(request, job, run, optimizer)
    rates = rates_of(model, [str(file) for file in run.state_files()], link_cache())
    foreseen = _foreseen(request, job, model, output)
    _tell_plan(plan, foreseen, request, job, model, output)
    reached = Reached()
    with ExitStack() as stack:
        metrics = stack.enter_context(MetricsFile(run.metrics, after=job.step))
        listeners: list[Callable[[StepRecord], None]] = [metrics.write, reached]
        board = open_board(run.board, after=job.step)
        if board is not None:
            stack.callback(board.close)
            listeners.append(board.write)
        stopping = stack.enter_context(StopSignals())
        progress = FinetuneProgress(
            output.notes, steps=plan.steps, done=job.step, rates=rates, plan=model.penstock.plan
        )
        listeners.append(stack.enter_context(progress))
        loop = Loop(
            model=model,
            optimizer=optimizer,
            batches=job.batches,
            sequences=len(job.data.training),
            evaluation=lambda: job.data.evaluation_batches(batch=request.recipe.batch),
            options=LoopOptions(
                schedule=job.schedule,
                commit_every=request.commit_every,
                commit_minutes=request.commit_minutes,
                eval_every=request.eval_every,
            ),
            settings=job.settings,
            step=job.step,
            listeners=listeners,
            before_commit=metrics.sync,
            stop=stopping,
        )
        began = time.monotonic()
        try:
            finished = loop.run()
        except BaseException:
            output.notes.print(Text(f"ended in step {loop.step + 1}; --resume goes on from the last commit, if any"))
            raise
        reached.total_s = time.monotonic() - began
    _draw(request, run)
    if not finished:
        output.notes.print(Text(f"told to stop: committed at step {loop.step} of {plan.steps}; --resume goes on there"))
    distance = distance_of(reached.steady, rates)
    for line in _summary(run, reached, distance, model):
        output.notes.print(Text(line))
    if request.as_json:
        output.write_json(_document(request, plan, foreseen, loop, reached, distance, model))
    return OK if finished else stopping.exit_code


def _foreseen(request: FinetuneRequest, job: Job, model: Any, output: Output) -> TrainingForecast | None:
    """What a step of the run would take; None, and a note, where that cannot be said. A run begins all the same."""
    hardware = kept_machine(request.device, disk=request.out)
    if hardware is None:
        output.notes.print(
            Text("how long steps take is not foreseen: run `penstock calibrate` once to have it measured")
        )
        return None
    with output.busy("foreseeing a step"):
        try:
            return foresee(request, job, hardware, room=room_of(model.penstock.plan))
        except PenstockError as error:
            output.notes.print(Text(f"how long steps take is not foreseen: {error}"))
        except Exception as error:  # whatever it is, the training itself does not need it
            logger.warning("how long steps take is not foreseen: %s: %s", type(error).__name__, error)
            logger.debug("where foreseeing failed", exc_info=True)
    return None


def _tell_plan(
    plan: FinetunePlan,
    foreseen: TrainingForecast | None,
    request: FinetuneRequest,
    job: Job,
    model: Any,
    output: Output,
) -> None:
    output.notes.print(explain(model))
    aside = 0 if job.data.evaluation is None else job.data.evaluation.statistics.documents
    for line in plan_lines(plan, request, job.data.training.statistics, aside):
        output.notes.print(Text(line))
    for line in () if foreseen is None else outlook_lines(foreseen, plan):
        output.notes.print(Text(line))
    if not takes_positions(model):
        kind = type(without_adapters(model)).__name__
        output.notes.print(Text(f"a {kind} takes no positions: documents that share a sequence see each other"))


def _draw(request: FinetuneRequest, run: RunFolder) -> None:
    """The chart. The run is durable without it."""
    curve = loss_curve(read_metrics(run.metrics))
    if not curve.training:
        return
    new = run.chart.with_suffix(".svg.new")
    try:
        new.write_text(draw_loss(curve, title=f"{os.path.basename(os.path.abspath(request.checkpoint))}: loss"))
        os.replace(new, run.chart)
    except OSError as error:
        raise DiskError(
            f"{run.chart} cannot be written: {error.strerror}; the run itself is committed, up to its last step"
        ) from error


def _summary(run: RunFolder, reached: Reached, distance: Distance, model: Any) -> list[str]:
    if reached.last is None:
        return []
    line = f"{reached.steps} steps in {duration(reached.total_s)}: {reached.seconds / reached.steps:.3g} s/step, "
    line += f"{reached.tokens / reached.seconds:,.0f} tokens/s; loss {reached.last.loss:.4f}"
    line += "" if reached.eval_loss is None else f", evaluation {reached.eval_loss:.4f}"
    line += "" if distance.value is None else f"; distance {distance.value:.2f}, bound by {distance.binds}"
    written = model.penstock.statistics().disk_written_nbytes
    return [
        f"{line}; {format_size(written)} written",
        f"steps are in {run.metrics}, the curve in {run.chart}; penstock.resume({os.fspath(run.path)!r}) has the model",
    ]


def _document(
    request: FinetuneRequest,
    plan: FinetunePlan,
    foreseen: TrainingForecast | None,
    loop: Loop,
    reached: Reached,
    distance: Distance,
    model: Any,
) -> dict[str, object]:
    """For --json. Sizes in bytes, times in seconds."""
    statistics = model.penstock.statistics()
    return {
        "run": os.fspath(request.out),
        "step": loop.step,
        "steps": plan.steps,
        "taken": reached.steps,
        "last": None if reached.last is None else reached.last.to_json(),
        "eval_loss": reached.eval_loss,
        "tokens": reached.tokens,
        "seconds": reached.total_s,
        "s_per_step": reached.seconds / reached.steps if reached.steps else None,
        "tokens_per_s": reached.tokens / reached.seconds if reached.seconds else None,
        "distance": distance.value,
        "bound_s_per_step": distance.bound_s / len(reached.steady) if reached.steady else None,
        "bound_by": distance.binds,
        "disk_read_nbytes": statistics.disk_read_nbytes,
        "disk_written_nbytes": statistics.disk_written_nbytes,
        "training": plan,
        "forecast": None if foreseen is None else document(foreseen),
        "plan": plan_summary(model.penstock.plan),
    }
