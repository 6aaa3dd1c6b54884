"""One model in training: gradients come in, and a step changes weights block by block while the next forward begins.

`step` takes the gradients, withdraws the blocks that they change, and returns; a thread updates them in the order in
which the next forward uses them, and gives each back as soon as its new weights are there. Whoever asks for a block
before that waits for it, and for nothing else. Nothing is read that a later block has not been updated for, so losses,
gradients and weights are those of a step that is carried out at once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...kernels.norms import GradientNorms, clip_coefficient
from ...kernels.optimizer import Clip, Optimizer
from ...kernels.scratch import Scratch
from ...memory.errors import ClosedError, PenstockError
from ..build import Machinery
from .gradients import Gradients, Trained
from .pipeline import ShardPipeline
from .shards import Shard
from .weights import TrainedWeights

logger = logging.getLogger(__name__)
SMALL = 0
"""The block of small tensors, which is lent for good: it is updated before `step` returns."""


class NonFiniteGradientError(PenstockError):
    """A gradient is infinite or not a number. Nothing was changed; its gradients are gone."""


@dataclass(kw_only=True, eq=False)
class Step:
    """One update of all weights, on its way."""

    gradients: list[torch.Tensor | None]
    hypers: Sequence[Any]
    """Of each parameter, as they were when `step` was called."""
    clip: Clip | None
    done: threading.Event = field(default_factory=threading.Event)


class Training:
    """Everything that trains one streamed model, and its end.

    Args:
        machinery: What runs it.
        trained: In the order of `parameters()`.
        gradients: Of these.
        shards: Of these, too.
        pipeline: Reads and writes them.
        weights: Where new weights go.
        optimizer: Its mathematics.
        steps: How many updates each parameter has had.
    """

    def __init__(
        self,
        *,
        machinery: Machinery,
        trained: Sequence[Trained],
        gradients: Gradients,
        shards: Sequence[Shard],
        pipeline: ShardPipeline,
        weights: TrainedWeights,
        optimizer: Optimizer[Any],
        steps: Sequence[int] = (),
    ) -> None:
        self.trained = trained
        self.gradients = gradients
        self.optimizer = optimizer
        self.steps = list(steps) or [0] * len(trained)
        self._machinery = machinery
        self._executor = machinery.executor
        self._shards = shards
        self._pipeline = pipeline
        self._weights = weights
        self._names = [each.name for each in trained]
        self._scratch = Scratch.of()
        self._under_way: Step | None = None
        self._error: Exception | None = None
        self._last_norm: torch.Tensor | None = None

    # --- a step -----------------------------------------------------------------------------------------------------

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
        self.finish()
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
            self.steps[index] += gradient is not None
        step = Step(gradients=gradients, hypers=hypers, clip=clip)
        blocks = self._blocks(gradients)
        for block in blocks:
            if block != SMALL:
                self._executor.core.withdraw(block)
        if SMALL in blocks:
            self._update(step, [SMALL])
        self._under_way = step
        rest = [block for block in blocks if block != SMALL]
        threading.Thread(target=self._carry_out, args=(step, rest), name="penstock-update", daemon=True).start()
        return True

    def _norm(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """The norm of all gradients in fp32, as `clip_grad_norm_` has it; None if there is none."""
        norms = GradientNorms(len(gradients))
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                norms.add(index, gradient if gradient.dtype == torch.float32 else gradient.to(torch.float32))
        return norms.total() if any(gradient is not None for gradient in gradients) else None

    def _blocks(self, gradients: Sequence[torch.Tensor | None]) -> list[int]:
        """Blocks that change, in the order in which a forward uses them."""
        return list(
            dict.fromkeys(
                shard.block
                for shard in self._shards
                if any(gradients[piece.parameter] is not None for piece in shard.pieces)
            )
        )

    def _carry_out(self, step: Step, blocks: Sequence[int]) -> None:
        try:
            self._update(step, blocks)
        except Exception as error:  # it must surface in the thread that trains, and free whoever waits for a block
            logger.debug("an update failed", exc_info=True)
            self._error = error
            self._executor.fail(error)
        finally:
            step.done.set()

    def _update(self, step: Step, blocks: Sequence[int]) -> None:
        wanted = set(blocks)
        shards = [
            shard
            for shard in self._shards
            if shard.block in wanted and any(step.gradients[piece.parameter] is not None for piece in shard.pieces)
        ]
        last = {shard.block: shard.id for shard in shards}
        views: Mapping[str, torch.Tensor] = {}

        def work(shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
            nonlocal views
            if not views:
                views = self._open(shard.block, step)
            for piece in shard.pieces:
                gradient = step.gradients[piece.parameter]
                if gradient is None:
                    continue
                here = slice(piece.at, piece.at + piece.elements)
                self.optimizer.update(
                    arrays[0][here],
                    [array[here] for array in arrays[1:]],
                    gradient[piece.start : piece.stop],
                    step.hypers[piece.parameter],
                    step=self.steps[piece.parameter],
                    scratch=self._scratch,
                    out=views[self._names[piece.parameter]][piece.start : piece.stop],
                    clip=step.clip,
                )
                if piece.stop == len(gradient):
                    step.gradients[piece.parameter] = None
            if last[shard.block] == shard.id:
                self._close(shard.block)
                views = {}

        self._pipeline.run([shard.id for shard in shards], work)

    def _open(self, block: int, step: Step) -> Mapping[str, torch.Tensor]:
        if block != SMALL:
            self._executor.withdrawn(block)
        present = {piece.parameter for shard in self._shards if shard.block == block for piece in shard.pieces}
        names = {self._names[index] for index in present if step.gradients[index] is not None}
        return self._weights.begin(block, whole=names == set(self._weights.names(block)))

    def _close(self, block: int) -> None:
        self._weights.end(block)
        if block != SMALL:
            self._executor.readmit(block)

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

        self._pipeline.run(range(len(self._shards)), work, new=True)

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
                self._close(shard.block)
                views = {}

        self._pipeline.run(range(len(self._shards)), work, write=False)

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

    def finish(self) -> None:
        """Wait until the last step has been carried out.

        Raises:
            PenstockError: it failed. The last commit is what is left.
        """
        step, self._under_way = self._under_way, None
        if step is not None:
            step.done.wait()
        if self._error is not None:
            raise self._error
        if self._machinery.closing:
            raise ClosedError("the model was closed by penstock.close(); resume the run")

    def close(self) -> None:
        """End the step under way, and give all memory back."""
        step, self._under_way = self._under_way, None
        if step is not None:
            step.done.wait()
        self.gradients.close()
        self._weights.close()
        self._pipeline.close()
