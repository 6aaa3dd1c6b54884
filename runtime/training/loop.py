"""The loop of a fine-tuning run: steps, evaluations and commits, in an order that a run which goes on repeats exactly.

A step's figures are written down before the commit that holds the step, so that the file of metrics never knows less
than the last commit. What a killed run did after its last commit is done again, with the same bits.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...memory.errors import UsageError
from ...memory.store import Commit
from .data.batches import Batch, Batches
from .evaluation import evaluate, model_inputs
from .facade import StreamedOptimizer
from .metrics import StepRecord
from .progress import Progress
from .run import random_state, set_random_state
from .schedule import LearningRate, Schedule

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopOptions:
    """How long a run is, and what happens between its steps.

    Raises:
        UsageError: a number has no meaning.
    """

    schedule: Schedule
    """Its `steps` are the run's."""
    commit_every: int
    """Steps from one commit to the next; the end of the run is one, too."""
    commit_minutes: float | None = None
    """Minutes after which the end of a step is one, too; None for none."""
    eval_every: int | None = None
    """Steps from one evaluation to the next. None: after the last step only."""

    def __post_init__(self) -> None:
        for name, value in (("commit_every", self.commit_every), ("eval_every", self.eval_every)):
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} has no meaning: give 1 or more")
        if self.commit_minutes is not None and not self.commit_minutes > 0:
            raise UsageError(f"commit_minutes={self.commit_minutes} has no meaning: give a number above 0")

    def commit_due(self, *, step: int, seconds: float) -> bool:
        """Whether the end of a step is a commit.

        Args:
            step: Its number, from 1.
            seconds: Since the last one.
        """
        late = self.commit_minutes is not None and seconds >= 60 * self.commit_minutes
        return late or step % self.commit_every == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What one step was."""

    loss: float
    batches: Sequence[Batch]
    updated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """What the run has moved and waited so far. Sizes in bytes."""

    read: int
    """From drives."""
    written: int
    copied: int
    """To a device apart."""
    waited_s: float


@dataclass(kw_only=True, eq=False)
class Loop:
    """Trains a model to the end of its run, or until it is told to stop."""

    model: Any
    """What `penstock.prepare` or `penstock.resume` returned; a causal language model of transformers."""
    optimizer: StreamedOptimizer
    batches: Batches
    """They stand where the run is."""
    sequences: int
    """Of an epoch."""
    evaluation: Callable[[], Iterator[Batch]]
    """Gives the evaluation's batches; none where there is no evaluation."""
    options: LoopOptions
    settings: Mapping[str, Any] = field(default_factory=dict)
    """For the commits."""
    step: int = 0
    """Steps that are done."""
    listeners: Sequence[Callable[[StepRecord], None]] = ()
    """Told of every step, in this order."""
    before_commit: Callable[[], None] = lambda: None
    """Makes durable what must not be behind a commit."""
    stop: Callable[[], bool] = lambda: False
    """Whether to end: asked before each backward pass."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds."""

    def __post_init__(self) -> None:
        self._rate = LearningRate(self.optimizer.param_groups, self.options.schedule)
        self._position = self.batches.position
        """Behind the last step that is done."""
        self._commit: Commit | None = None
        self._evaluates = next(self.evaluation(), None) is not None

    def run(self) -> bool:
        """Take the steps that are left, and commit the last one.

        A step that is under way when the run is told to stop is given up: nothing of it is left.

        Returns:
            Whether all steps are done.

        Raises:
            NonFiniteGradientError: and this is to be an error. The last commit is what is left.
            PenstockError: a step or a commit failed; likewise.
        """
        self.model.train()
        committed, committed_s = self.step if self.step else None, self.clock()
        while self.step < self.options.schedule.steps:
            began, moved = self.clock(), self._totals()
            taken = self._take_step()
            if taken is None:
                break
            # `step()` of the optimizer returns early: what is left of the update counts where it is waited for.
            record = self._record(taken, seconds=self.clock() - began, moved=moved)
            for listener in self.listeners:
                listener(record)
            now = self.clock()
            if self.options.commit_due(step=self.step, seconds=now - committed_s):
                self.commit()
                committed, committed_s = self.step, now
        if committed != self.step:
            self.commit()
        if self._commit is not None:
            self._commit.wait()
        return self.step == self.options.schedule.steps

    def commit(self) -> None:
        """Make the present state durable; it is published in the background.

        Raises:
            PenstockError: the commit before this one failed, or what the last step met in the background.
        """
        if self._commit is not None and self._commit.error is not None:
            raise self._commit.error
        self.before_commit()
        progress = Progress(step=self.step, position=self._position, settings=self.settings)
        self._commit = self.optimizer.commit(self._rate.state_dict(), progress.to_json())
        logger.info("commit of step %d is under way", self.step)

    def _take_step(self) -> Taken | None:
        """One step; None where the run is to end, and then everything is as it was before."""
        random = random_state()
        batches = self.batches.step()
        tokens = sum(batch.loss_tokens for batch in batches)
        losses = []
        for batch in batches:
            if self.stop():
                self.optimizer.zero_grad()
                set_random_state(random)
                return None
            if batch.loss_tokens:  # the mean over none is no number
                # The model's loss is the mean over the batch: so the sum over all batches is that over the step.
                loss = self.model(**model_inputs(self.model, batch)).loss * (batch.loss_tokens / tokens)
                loss.backward()
                losses.append(loss.detach())
        updated = bool(losses) and self._update()
        self._position = self.batches.position
        self.step += 1
        return Taken(loss=sum(float(loss) for loss in losses) if losses else math.nan, batches=batches, updated=updated)

    def _update(self) -> bool:
        self._rate.set(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return bool(torch.isfinite(self._norm()))

    def _norm(self) -> torch.Tensor:
        norm = self.optimizer.training.gradient_norm
        return torch.tensor(math.nan) if norm is None else norm

    def _totals(self) -> Totals:
        statistics = self.model.penstock.statistics()
        return Totals(
            read=statistics.disk_read_nbytes,
            written=statistics.disk_written_nbytes,
            copied=statistics.h2d_nbytes,
            waited_s=statistics.waited_s + self.optimizer.training.waited_s,
        )

    def _record(self, taken: Taken, *, seconds: float, moved: Totals) -> StepRecord:
        tokens = sum(batch.tokens for batch in taken.batches)
        now = self._totals()
        last = self.step == self.options.schedule.steps
        every = self.options.eval_every
        due = self._evaluates and (last or (every is not None and self.step % every == 0))
        return StepRecord(
            step=self.step,
            epoch=self._position.epoch + self._position.index / self.sequences,
            loss=taken.loss,
            lr=self._rate.lr,
            gradient_norm=float(self._norm()) if taken.updated else math.nan,
            tokens=tokens,
            loss_tokens=sum(batch.loss_tokens for batch in taken.batches),
            seen_tokens=self._position.tokens,
            seconds=seconds,
            tokens_per_s=tokens / seconds if seconds else 0.0,
            computed_s=max(seconds - (now.waited_s - moved.waited_s), 0.0),
            disk_read_nbytes=now.read - moved.read,
            disk_written_nbytes=now.written - moved.written,
            copied_nbytes=now.copied - moved.copied,
            updated=taken.updated,
            eval_loss=evaluate(self.model, self.evaluation()) if due else None,
        )
