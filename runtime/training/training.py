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

from ...kernels.norms import GradientNorms, clip_coefficient, total_norm
from ...kernels.optimizer import Clip
from ...memory.errors import ClosedError, PenstockError, UsageError
from ...memory.store import Commit
from ..build import Machinery
from .gradients import Gradient, Gradients, SpilledGradient
from .pipeline import ShardPipeline
from .shards import Shard
from .trained import Trained
from .updater import SMALL, Step, Updater
from .weights import Weights

logger = logging.getLogger(__name__)
BEHIND = 3
"""Blocks whose gradients wait for their update, before backward waits for that, where there is no room for more."""
Hypers = Callable[[], Sequence[Any]]
"""Hyperparameters of each parameter, as they are now."""


class NonFiniteGradientError(PenstockError):
    """A gradient is infinite or not a number."""


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
        self._blocks = [SMALL] * len(trained)
        """Of each parameter."""
        for shard in shards:
            for piece in shard.pieces:
                self._blocks[piece.parameter] = shard.block
        self._last_norm: torch.Tensor | None = None
        self._hypers: Hypers | None = None
        """Where blocks are submitted by backward."""
        self._step: Step | None = None
        """The one that backward has begun to submit."""
        self._missing: dict[int, int] = {}
        """Of that one: parameters of each block whose gradients have not come. A block is submitted when none is."""
        self._used: set[int] = set()
        """Parameters whose gradients have."""
        self._submitted: set[int] = set()
        """Blocks that backward has submitted."""
        self._lost: PenstockError | None = None
        """Why the model is between two steps for good."""
        self._unsaved = 0
        """Steps since the last commit."""

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
        if self._hypers is not None:
            return self._end_early_step(hypers)
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
        self._unsaved += 1
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
        self._hypers = hypers
        self.gradients.on_whole = self._arrived

    def _arrived(self, index: int) -> None:
        """A gradient is whole (called in backward)."""
        assert self._hypers is not None
        if self._step is None:
            self.check()
            self._begin_step()
        step = self._step
        assert step is not None
        gradient = self.gradients.pop(index)
        if index in self._used:
            raise UsageError(
                f"a second gradient of {self._names[index]} before step(), and the first has gone into an update "
                "already: call step() after each backward pass, or say how many there are with accumulate=…"
            )
        self._use(step, index, gradient)
        block = self._blocks[index]
        self._missing[block] -= 1
        if block != SMALL and not self._missing[block]:
            self._updater.wait_below(self._behind)
            self._submitted.add(block)
            self._updater.submit(step, [block])

    def _begin_step(self) -> None:
        assert self._hypers is not None
        self._step = Step(
            gradients=[None] * len(self.trained),
            hypers=self._hypers(),
            counts=[count + 1 for count in self.counts],
            clip=None,
        )
        self._missing, self._used, self._submitted = {}, set(), set()
        for block in self._blocks:
            self._missing[block] = self._missing.get(block, 0) + 1

    def _use(self, step: Step, index: int, gradient: torch.Tensor) -> None:
        """Give a gradient to the step that has begun. Those from a device apart are looked at all together, later."""
        if not self.gradients.depart and not _is_finite(gradient):
            raise self._not_finite(f"the gradient of {self._names[index]}")
        self._used.add(index)
        step.gradients[index] = gradient
        self.counts[index] += 1

    def forget(self) -> None:
        """Drop the gradients that no step has used.

        Raises:
            UsageError: parts of the model have been updated with them.
        """
        if self._step is not None:
            raise UsageError(
                "zero_grad() after backward and without step(): parts of the model have been updated with these "
                'gradients already, since nothing had to wait. With nonfinite="skip", or max_grad_norm, updates begin '
                "at step()"
            )
        self.gradients.clear()

    def _end_early_step(self, hypers: Sequence[Any]) -> bool:
        """Submit what is not whole: blocks of which some parameters had no gradient, and the small tensors."""
        rest = self.gradients.take()
        if self._step is None:
            if all(gradient is None for gradient in rest):
                return False
            self._begin_step()
        step = self._step
        assert step is not None
        if list(hypers) != list(step.hypers):
            raise self._lose(
                UsageError(
                    "a learning rate, or another hyperparameter, was changed between backward and step(), when parts "
                    "of the model had been updated already. Change it after step(), as schedulers do; this run goes "
                    "on from its last commit with penstock.resume"
                )
            )
        for index, gradient in enumerate(rest):
            if gradient is not None:  # of fewer backward passes than there could have been
                assert not isinstance(gradient, SpilledGradient)
                self._use(step, index, gradient)
        if self.gradients.depart:
            self._check_norms(rest)
        self._step = None
        self._unsaved += 1
        self._updater.by_block()  # the next forward begins with the first
        self._submit(step, [block for block in self._having(step.gradients) if block not in self._submitted])
        return True

    def _check_norms(self, rest: Sequence[Gradient | None]) -> None:
        """See that the gradients of the step are finite: all that left the device on the way, and the rest."""
        norms = self.gradients.norms_on_the_way
        for index, gradient in enumerate(rest):
            if gradient is not None and not self.gradients.has_norm(index):
                norms.append(self.gradients.norm(index, gradient))
        self._last_norm = total_norm(norms).cpu()
        if not bool(torch.isfinite(self._last_norm)):
            raise self._not_finite(f"the norm of all gradients is {self._last_norm.item()}: one of them")

    def _not_finite(self, what: str) -> PenstockError:
        return self._lose(
            NonFiniteGradientError(
                f"{what} is not finite, and parts of the model have been updated with others of this backward "
                "already: go on from the last commit with penstock.resume, or have whole steps skipped with "
                'nonfinite="skip"'
            )
        )

    def _lose(self, error: PenstockError) -> PenstockError:
        """Note that the model is between two steps, and cannot go on."""
        self._lost = error
        return error

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
        if self._lost is not None:
            raise self._lost
        if self._machinery.closing:
            raise ClosedError("the model was closed by penstock.close(); resume the run")

    def finish(self) -> None:
        """Wait until the last step has been carried out.

        Raises:
            UsageError: one has been begun by backward, and has not ended.
            PenstockError: as `check`.
        """
        self.check()
        if self._step is not None:
            raise UsageError(
                "between backward and step() parts of the model are a step ahead of others: save, and look at weights, "
                "after step(); if a backward pass was interrupted, go on from the last commit with penstock.resume"
            )
        self._updater.wait()

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
        steps = self._unsaved

        def done(commit: Commit) -> None:
            if commit.error is None:
                self._unsaved = max(0, self._unsaved - steps)
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
            if self._unsaved:
                logger.warning(
                    "the model is closed %d steps after the last commit of its run, and they are gone with it: call "
                    "penstock.save(model, optimizer) before penstock.close(model)",
                    self._unsaved,
                )

    def close(self) -> None:
        """Give all memory back."""
        self._updater.close()
        self.gradients.close()
        self._weights.close()
        self._pipeline.close()


def _is_finite(gradient: torch.Tensor) -> bool:
    return bool(torch.isfinite(gradient.sum(dtype=torch.float32))) or bool(torch.isfinite(gradient).all())


def _each(shards: Sequence[Shard]) -> Callable[[], int | None]:
    left = iter(range(len(shards)))
    return lambda: next(left, None)
