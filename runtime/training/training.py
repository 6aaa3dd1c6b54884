"""One model in training: gradients come in, and steps change the weights, block by block, beside all else.

Where gradients are clipped, or a step may have to be left out, no weight can change before the last gradient is there:
`step` submits all blocks in the order in which the next forward uses them, and returns; whoever asks for a block before
its new weights are there waits for it, and for nothing else. Otherwise a block is submitted by backward itself, as soon
as its last gradient is there, and gradients do not pile up. Either way losses, gradients and weights are those of steps
that are carried out at once: nothing is read that has not been updated for its step.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ...kernels.norms import GradientNorms, clip_coefficient
from ...kernels.optimizer import Clip
from ...memory.errors import ClosedError, PenstockError, UsageError
from ...memory.store import Commit
from ..build import Machinery
from .blockchanges import Step
from .catchup import CatchUp
from .early import BEHIND, EarlySteps, Hypers, NonFiniteGradientError
from .gradients import Gradients
from .intake import Gradient
from .pipeline import ShardPipeline
from .shards import SMALL, Shard, blocks_of
from .trained import Trained
from .updater import Updater
from .wear import Wear
from .weights import Weights

logger = logging.getLogger(__name__)


class Training:
    """Everything that trains one streamed model, and its end.

    Args:
        machinery: What runs it.
        trained: In the order of `parameters()`.
        gradients: Of these.
        shards: Of these, too.
        pipeline: Reads and writes them.
        weights: Where new weights go.
        updater: Changes them.
        behind: Blocks whose gradients wait for their update, before backward waits for that, where that begins them.
        counts: How many updates each parameter has had.
        catch_up: Makes updates that experts without tokens owe.
    """

    def __init__(
        self,
        *,
        machinery: Machinery,
        trained: Sequence[Trained],
        gradients: Gradients,
        shards: Sequence[Shard],
        pipeline: ShardPipeline,
        weights: Weights,
        updater: Updater,
        behind: int = BEHIND,
        counts: Sequence[int] = (),
        catch_up: CatchUp | None = None,
    ) -> None:
        self.trained = trained
        self.gradients = gradients
        self.counts = list(counts) or [0] * len(trained)
        self._machinery = machinery
        self._executor = machinery.executor
        self._shards = shards
        self._pipeline = pipeline
        self._weights = weights
        self._updater = updater
        self._behind = behind
        self._names = [each.name for each in trained]
        self._blocks = blocks_of(shards, len(trained))
        """Of each parameter."""
        self.catch_up = catch_up
        self._last_norm: torch.Tensor | None = None
        self._early: EarlySteps | None = None
        """Where blocks are submitted by backward."""
        self._taken = 0
        """Steps."""
        self._committed = 0
        """Of these, those that a published commit has."""

    # --- a step that begins when all gradients are there --------------------------------------------------------------

    def step(self, hypers: Sequence[Any], *, max_norm: float | None, skip_nonfinite: bool) -> bool:
        """Update all parameters that have a gradient. Returns before most of it has happened.

        Args:
            hypers: Hyperparameters of each parameter.
            max_norm: Clip the norm of all gradients to this.
            skip_nonfinite: Do nothing where a gradient is not finite, rather than raise.

        Returns:
            Whether it was done.

        Raises:
            NonFiniteGradientError: a gradient is not finite. Nothing was changed.
            PenstockError: what the step before it met in the background.
        """
        self.check()
        if self._early is not None:
            return self._end_early_step(self._early, hypers)
        self._updater.wait()
        gradients = self.gradients.take()
        norm = self._norm(gradients)
        if norm is None:
            return False  # no backward came by
        self._last_norm = norm
        if not bool(torch.isfinite(norm)):
            if skip_nonfinite:
                logger.warning("the gradient norm is %s: the step is skipped", norm.item())
                return False
            raise NonFiniteGradientError(
                f"the norm of all gradients is {norm.item()}: nothing was changed. Lower the learning rate, look at "
                'the data of this batch, or skip such steps with nonfinite="skip"'
            )
        clip = None if max_norm is None else Clip(coefficient=clip_coefficient(norm, max_norm), widen=True)
        for index, gradient in enumerate(gradients):
            self.counts[index] += gradient is not None
        step = Step(gradients=gradients, hypers=hypers, counts=tuple(self.counts), clip=clip)
        self._taken += 1
        self._submit(step, self._having(gradients))
        return True

    def _submit(self, step: Step, blocks: Iterable[int]) -> None:
        """Submit blocks; the small tensors, which cannot be withdrawn, are changed before this returns."""
        self._machinery.session.saved.generation += 1
        blocks = list(blocks)
        if SMALL in blocks:
            self._updater.submit(step, [SMALL], urgent=True)
        self._updater.submit(step, (block for block in blocks if block != SMALL))
        if SMALL in blocks:
            self._updater.wait(SMALL)

    def _norm(self, gradients: Sequence[Gradient | None]) -> torch.Tensor | None:
        """The norm of all gradients in fp32, as `clip_grad_norm_` has it; None if there is none."""
        norms = GradientNorms(len(gradients))
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                norms.note(index, self.gradients.norm(index, gradient))
        if all(gradient is None for gradient in gradients):
            return None
        return norms.total().cpu()  # of a device apart: the one wait for it

    def _having(self, gradients: Sequence[Gradient | None]) -> list[int]:
        """Blocks with a gradient, in the order in which a forward uses them."""
        return sorted({self._blocks[index] for index, gradient in enumerate(gradients) if gradient is not None})

    # --- a step that backward begins ----------------------------------------------------------------------------------

    def begin_early(self, hypers: Hypers) -> None:
        """Submit each block as soon as its last gradient is there, from now on."""
        early = self._early = EarlySteps(
            names=self._names,
            blocks=self._blocks,
            counts=self.counts,
            gradients=self.gradients,
            updater=self._updater,
            hypers=hypers,
            behind=self._behind,
        )

        def arrived(index: int) -> None:
            if not early.begun:
                self.check()
            early.arrived(index, self.gradients.pop(index))

        self.gradients.announce(arrived, early.free_place)

    def forget(self) -> None:
        """Drop the gradients that no step has used.

        Raises:
            UsageError: parts of the model have been updated with them.
        """
        if self._early is not None and self._early.begun:
            raise UsageError(
                "zero_grad() after backward and without step(): parts of the model have been updated with these "
                'gradients already, since nothing had to wait. With nonfinite="skip", or max_grad_norm, updates begin '
                "at step()"
            )
        self.gradients.clear()

    def _end_early_step(self, early: EarlySteps, hypers: Sequence[Any]) -> bool:
        """Submit what is not whole: blocks of which some parameters had no gradient, and the small tensors."""
        ended = early.end(self.gradients.take, hypers)
        if ended is None:
            return False
        self._last_norm = early.norm
        self._taken += 1
        self._updater.by_block()  # the next forward begins with the first
        self._submit(*ended)
        return True

    # --- masters ----------------------------------------------------------------------------------------------------

    def write_masters(self, value: Callable[[int], torch.Tensor]) -> None:
        """Make all shards anew: masters from `value(parameter)`, flat fp32 as they lie in memory; states zero."""
        held: dict[int, torch.Tensor] = {}

        def work(shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
            for piece in shard.pieces:
                if piece.parameter not in held:
                    held.clear()
                    held[piece.parameter] = value(piece.parameter)
                arrays[0][piece.at : piece.at + piece.elements] = held[piece.parameter][piece.start : piece.stop]

        self._pipeline.run(_each(self._shards), work, new=True)

    def weights_from_masters(self) -> None:
        """Make all weights anew, by rounding their masters: what a run that goes on begins with."""
        last = {shard.block: shard.id for shard in self._shards}
        views: Mapping[str, torch.Tensor] = {}

        def work(shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
            nonlocal views
            if not views:
                self._bring(shard.block)
                views = self._weights.begin(shard.block, whole=False)
            for piece in shard.pieces:
                here = slice(piece.at, piece.at + piece.elements)
                views[self._names[piece.parameter]][piece.start : piece.stop].copy_(arrays[0][here])
            if last[shard.block] == shard.id:
                self._weights.end(shard.block)
                if shard.block != SMALL:
                    self._executor.readmit(shard.block)
                views = {}

        self._pipeline.run(_each(self._shards), work, write=False)

    def _bring(self, block: int) -> None:
        """Have a block withdrawn, and its old weights where they stay, if they do: else they would come later."""
        if block != SMALL:
            self._executor.release(self._executor.acquire(block, observed=False))
            self._executor.withdraw(block)

    # --- the end ----------------------------------------------------------------------------------------------------

    @property
    def gradient_norm(self) -> torch.Tensor | None:
        """The norm of all gradients of the last step, before clipping; 0-dim, fp32."""
        return self._last_norm

    @property
    def waited_s(self) -> float:
        """That training has waited for updates, gradients and activations on their way, beside waits for blocks."""
        keeper = self._machinery.session.saved.keeper
        waited = self._updater.waited_s + self.gradients.intake.waited_s
        return waited + (0.0 if keeper is None else keeper.store.waited_s)

    def wear(self) -> Wear:
        """What is written by each step, and by each commit."""
        moving = self._weights.written_nbytes({shard.block for shard in self._shards})
        return Wear(
            step_nbytes=self._pipeline.moving_nbytes + moving + self.gradients.written_nbytes,
            commit_nbytes=self._pipeline.staying_nbytes,
            activations_nbytes=self._activations_written(),
        )

    def _activations_written(self) -> int | None:
        """Bytes of them that a step writes to disk; None where no forward has shown it yet."""
        keeper = self._machinery.session.saved.keeper
        if keeper is None or all(tier.place != "disk" for tier in keeper.machine.tiers):
            return 0
        if keeper.plan is None:
            return None
        return self.gradients.most * keeper.plan.placement.nbytes_at("disk")

    @property
    def limit_nbytes(self) -> int:
        """What blocks were cut by."""
        return self._machinery.layout.limit_nbytes

    def check(self) -> None:
        """See that it can go on.

        Raises:
            PenstockError: an update failed. The last commit is what is left.
            ClosedError: the model was closed.
        """
        self._updater.check()
        if self._early is not None and self._early.lost is not None:
            raise self._early.lost
        if self._machinery.closing:
            raise ClosedError("the model was closed by penstock.close(); resume the run")

    def finish(self) -> None:
        """Wait until the last step has been carried out.

        Raises:
            UsageError: one has been begun by backward, and has not ended.
            PenstockError: as `check`.
        """
        self.check_between()
        self._drain()
        self._updater.wait()

    def _drain(self) -> None:
        """Have all updates made that are owed: after those that are under way, and before any that comes."""
        if self.catch_up is not None:
            self.catch_up.drain()

    def check_between(self) -> None:
        """See that it can go on, and is between two steps. Raises as `finish` does."""
        self.check()
        if self._early is not None and self._early.begun:
            raise UsageError(
                "between backward and step() parts of the model are a step ahead of others: save, and look at weights, "
                "after step(); if a backward pass was interrupted, go on from the last commit with penstock.resume"
            )

    def cut(self, make: Callable[[], object], failed: Callable[[Exception], None]) -> None:
        """Have a commit made of the state after the last step, whose update may be under way; returns at once.

        What is in host memory only begins to be written before. Until it is made, no further update begins.

        Args:
            make: Makes it.
            failed: Called with the reason where that cannot be.

        Raises:
            PenstockError: as `check`.
        """

        def write_out_and_make() -> None:
            self.write_out()
            make()

        self._drain()
        self._updater.between(write_out_and_make, failed)

    def write_out(self) -> None:
        """Begin to write what of masters and states is in host memory only: a commit from now on has all of them.

        Raises:
            PenstockError: a write failed. The last commit is what is left.
        """
        self._pipeline.write_out()

    def settle(self) -> None:
        """Wait until that is on disk. Before the end: the commit would be given up."""
        self._pipeline.settle()

    def saved(self) -> Callable[[Commit], None]:
        """Note that a commit has all steps up to here, once it is published: what is to be called then."""
        steps = self._taken

        def done(commit: Commit) -> None:
            if commit.error is None:
                self._committed = max(self._committed, steps)  # one may be published while the next is made
            else:  # whoever made it may not have waited for it
                logger.error("commit %d of the run was not made: %s", commit.number, commit.error)

        return done

    def last(self) -> None:
        """Carry the last step out, since the model is about to be closed, and say which steps go with it.

        Raises:
            PenstockError: it could not be carried out, and nobody has been told yet.
        """
        on_its_way = sys.exception()
        try:
            self._updater.end()
        except PenstockError:
            if on_its_way is None:  # else that is what the caller hears of
                raise
        finally:
            if unsaved := self._taken - self._committed:
                logger.warning(
                    "the model is closed %d steps after the last commit of its run, and they are gone with it: call "
                    "penstock.save(model, optimizer) before penstock.close(model)",
                    unsaved,
                )

    def close(self) -> None:
        """Give all memory back."""
        self._updater.close()
        if self.catch_up is not None:
            self.catch_up.close()
        self.gradients.close()
        self._weights.close()
        self._pipeline.close()


def _each(shards: Sequence[Shard]) -> Callable[[], int | None]:
    left = iter(range(len(shards)))
    return lambda: next(left, None)
