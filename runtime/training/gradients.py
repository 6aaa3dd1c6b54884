"""Gradients as they leave backward: taken from each parameter as soon as they are whole, added up, and kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ...kernels.norms import gradient_norm
from ...memory.errors import StallError, UsageError
from .intake import Gradient, GradientIntake
from .spill import GradientSpill
from .taken import TakenGradient
from .trained import Trained, gradient_dtype

logger = logging.getLogger(__name__)


class Gradients:
    """The gradients of one step.

    A gradient of one backward keeps its dtype; a second one is added in fp32, and so is every further one. Between
    passes `.grad` shows a `TakenGradient`; who removes it (`model.zero_grad()`) removes the gradient. It stays there
    after the step, as in PyTorch: a backward that finds it was to add to a gradient which is gone.

    From a device apart gradients leave while backward goes on (`Departures`): what is kept of one may not be there yet.
    Everything here waits for what it needs; who got it from `pop` has to (`wait`).
    """

    def __init__(self, trained: Sequence[Trained], intake: GradientIntake, *, most: int = 1) -> None:
        """Take gradients in from now on.

        Args:
            trained: Whose.
            intake: Brings them to where they are kept.
            most: Backward passes of a step.
        """
        self._trained = trained
        self.intake = intake
        self._norms: dict[int, torch.Tensor] = {}
        """Of what `take` gave last, and of what was popped before, those that were taken on the way."""
        self._most = most
        self._came = [0] * len(trained)
        self._on_whole: Callable[[int], None] | None = None
        self._kept: list[Gradient | None] = [None] * len(trained)
        self._shown: list[TakenGradient | None] = [None] * len(trained)
        """What `.grad` was left as, where a gradient is kept."""
        self._used: list[TakenGradient | None] = [None] * len(trained)
        """What `.grad` still is, where a step has used the gradient."""
        self._uncleared: set[int] = set()
        """Parameters that had that in `.grad` when a backward came."""
        self._hooks: list[Any] = []
        for index, each in enumerate(trained):
            self._hooks.append(each.parameter.register_hook(self._clearer(index)))  # type: ignore[no-untyped-call]
            hook: Any = each.parameter.register_post_accumulate_grad_hook
            self._hooks.append(hook(self._taker(index)))

    @property
    def spill(self) -> GradientSpill | None:
        """Where those go that are not kept."""
        return self.intake.spill

    def announce(self, whole: Callable[[int], None], full: Callable[[], None]) -> None:
        """Say when a gradient is whole, from now on: whoever hears of it has it updated while backward goes on.

        Args:
            whole: Called with the number of each parameter whose gradients of a step have all come.
            full: Called where one finds no place: has one given back.
        """
        self._on_whole = whole
        self.intake.early, self.intake.on_full = True, full

    def _clearer(self, index: int) -> Callable[[torch.Tensor], None]:
        """Called before a gradient is accumulated: what `.grad` shows must not be added to."""

        def clear(_: torch.Tensor) -> None:
            self._settle(index)
            self._uncleared.discard(index)
            used, self._used[index] = self._used[index], None
            if used is not None and self._trained[index].parameter.grad is used:
                self._trained[index].parameter.grad = None
                self._uncleared.add(index)

        return clear

    def _taker(self, index: int) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            grad = parameter.grad
            parameter.grad = None
            if index in self._uncleared:
                self._uncleared.discard(index)
                raise UsageError(
                    f"{self._trained[index].name} has a new gradient, and that of the last step was not cleared: "
                    "PyTorch would add the two, but step() has used it up. Call optimizer.zero_grad() after each step()"
                )
            if grad is not None:
                self.add(index, grad)
                parameter.grad = self._shown[index] = TakenGradient.of(
                    parameter, partial(self._present, index), partial(self._scale, index)
                )

        return take

    def _settle(self, index: int) -> None:
        """Leave nothing in `.grad` that is ours; forget what is kept if the caller removed it there."""
        parameter, shown = self._trained[index].parameter, self._shown[index]
        if shown is None:
            return
        self._shown[index] = None
        if parameter.grad is shown:
            parameter.grad = None
        else:
            self.intake.drop(index)
            self._kept[index] = None
            self._came[index] = 0

    def wait(self, index: int) -> None:
        """Wait until the gradient of a parameter is where it is kept.

        Raises:
            Exception: what came in its way.
        """
        self.intake.wait(index)

    def _scale(self, index: int, factor: torch.Tensor | float) -> None:
        """Multiply one, in place and in the dtype that it is kept in."""
        self.intake.scale(index, self._there(index), factor)

    def _present(self, index: int) -> torch.Tensor:
        return self.intake.present(index, self._there(index))

    def _there(self, index: int) -> Gradient:
        kept = self._kept[index]
        if kept is None:
            raise UsageError(
                f"the gradient of {self._trained[index].name} has gone into an update already: clip before step(). "
                'Where updates begin in backward, gradients cannot be clipped: leave updates="backward" out'
            )
        return kept

    def add(self, index: int, grad: torch.Tensor) -> None:
        """Take one in, of the parameter's shape.

        Raises:
            UsageError: it is sparse, or comes from more backward passes than a step was said to have.
            DiskError: it is to go to disk, and it or one before it cannot.
        """
        each = self._trained[index]
        if self._came[index] == self._most:
            raise UsageError(
                f"{each.name} has a gradient of {self._most} backward passes, and another one comes before step(): "
                f"memory was set aside for so many. Say how many there are: penstock.prepare(…, accumulate="
                f"{self._most + 1})"
            )
        if grad.layout is not torch.strided:
            raise UsageError(
                f"the gradient of {each.name} is sparse, and only dense ones can be streamed: make its embedding with "
                "sparse=False"
            )
        self._came[index] += 1
        whole = self._came[index] == self._most
        flat = _as_in_memory(grad.detach(), each)
        self._kept[index] = self.intake.take_in(index, flat, self._kept[index], whole=whole)
        if whole and self._on_whole is not None:
            self._on_whole(index)

    @property
    def most(self) -> int:
        """Backward passes of a step, at most."""
        return self._most

    @property
    def depart(self) -> bool:
        """Whether they are made on a device apart."""
        return self.intake.departs

    def norm(self, index: int, gradient: Gradient) -> torch.Tensor:
        """The norm in fp32 of one that `take` gave, 0-dim; on the device, if it was taken there."""
        found = self._norms.get(index)
        if found is None:
            assert isinstance(gradient, torch.Tensor)  # else it was taken when it went to disk
            found = gradient_norm(self.intake.wide.of(gradient))
        return found

    @property
    def norms_on_the_way(self) -> dict[int, torch.Tensor]:
        """Of those of what `take` gave last, and of what was popped before, that were taken while they came."""
        return dict(self._norms)

    def kept_nbytes(self, index: int) -> int:
        """What one takes until its update, in memory or on disk."""
        each = self._trained[index]
        return each.elements * gradient_dtype(each, wide=self._most > 1).itemsize

    def pop(self, index: int) -> torch.Tensor:
        """One that comes, flat and in host memory; see `wait`. It is not kept."""
        gradient, self._kept[index] = self._kept[index], None
        assert isinstance(gradient, torch.Tensor)
        return gradient

    def take(self) -> list[Gradient | None]:
        """All of them; None where no backward reached a parameter. None is kept. What went to disk is there.

        Raises:
            UsageError: one was put into `.grad` by hand, and does not fit what else is kept.
            DiskError: one is lost, which was to go to disk. All are forgotten.
        """
        for index, each in enumerate(self._trained):
            shown = self._shown[index]
            untouched = shown is not None and each.parameter.grad is shown
            self._settle(index)
            if untouched:
                each.parameter.grad = self._used[index] = shown
            elif (grad := each.parameter.grad) is not None and grad is not self._used[index]:
                each.parameter.grad = None  # by hand, or of a time before it was streamed
                self.add(index, grad)
        try:
            self.intake.settle()
            self._norms = self.intake.take_norms(self._kept)
        except Exception:
            self.clear()
            raise
        kept, self._kept = self._kept, [None] * len(self._trained)
        self._came = [0] * len(self._trained)
        return kept

    def clear(self) -> None:
        """Forget all of them.

        Raises:
            StallError: a drive does not let go of one.
        """
        for index, each in enumerate(self._trained):
            self._shown[index] = None
            each.parameter.grad = None
        self.intake.forget()
        self._kept = [None] * len(self._trained)
        self._came = [0] * len(self._trained)
        self._used = [None] * len(self._trained)
        self._uncleared.clear()

    @property
    def written_nbytes(self) -> int:
        """What a step of all its backward passes writes of them."""
        if self.spill is None:
            return 0
        passes = self._most if self._on_whole is None else self._most - 1  # the last one goes into the update
        return passes * self.spill.nbytes

    @property
    def nbytes(self) -> int:
        """Of host memory, now."""
        return sum(grad.nbytes for grad in self._kept if isinstance(grad, torch.Tensor))

    def close(self) -> None:
        """Leave the parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()
        self.intake.end()
        try:
            self.clear()
        except StallError as error:  # the rest is to be given back all the same
            logger.warning("%s", error)
        self.intake.close()


def _as_in_memory(grad: torch.Tensor, each: Trained) -> torch.Tensor:
    """A gradient as one row, its elements in the order in which those of the weight lie in memory."""
    if tuple(grad.stride()) != each.stride:
        ordered = torch.empty_strided(tuple(grad.shape), each.stride, dtype=grad.dtype, device=grad.device)
        grad = ordered.copy_(grad)
    return grad.as_strided((grad.numel(),), (1,))
