"""Gradients as they leave backward: taken from each parameter as soon as they are whole, added up, and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate as accumulated
from typing import Any

import torch
from torch import nn

from ...kernels.accumulation import accumulate
from ...kernels.scratch import Scratch
from ...memory.arena import HostArena, round_up
from ...memory.errors import UsageError
from ...memory.image import ALIGN
from .taken import TakenGradient


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """One parameter that is trained."""

    name: str
    parameter: nn.Parameter
    stride: tuple[int, ...]
    """Of its elements in memory, when its weights are there."""

    @property
    def elements(self) -> int:
        """How many."""
        return self.parameter.numel()


class GradientRoom:
    """A place for the gradient of every parameter, made once.

    Kept where autograd puts them, between activations that come and go, gradients leave holes that malloc cannot use:
    100 MiB and more of a few hundred. A place is used again in the next step: by then the forward has waited for the
    update that used it.
    """

    def __init__(self, trained: Sequence[Trained], *, wide: bool) -> None:
        """`wide`: in fp32, for gradients that are added up; else in the dtype of the parameter."""
        self._dtypes = [torch.float32 if wide else each.parameter.dtype for each in trained]
        sizes = [each.elements * dtype.itemsize for each, dtype in zip(trained, self._dtypes, strict=True)]
        self._offsets = list(accumulated((round_up(size, ALIGN) for size in sizes), initial=0))
        self._sizes = sizes
        self._arena = HostArena(max(self._offsets[-1], 1), tier="gradients")

    def put(self, index: int, flat: torch.Tensor) -> torch.Tensor:
        """A copy of a gradient in its place."""
        if not self._sizes[index]:
            return flat.cpu()
        raw = self._arena.view(self._offsets[index], self._sizes[index])
        return torch.frombuffer(raw, dtype=self._dtypes[index]).copy_(flat)

    def close(self) -> None:
        """Give the memory back."""
        self._arena.close()


class Gradients:
    """The gradients of one step.

    A gradient of one backward keeps its dtype; a second one is added in fp32, and so is every further one. Between
    passes `.grad` shows a `TakenGradient`; who removes it (`model.zero_grad()`) removes the gradient. It stays there
    after the step, as in PyTorch: a backward that finds it was to add to a gradient which is gone.
    """

    def __init__(
        self, trained: Sequence[Trained], scratch: Scratch, *, most: int = 1, room: GradientRoom | None = None
    ) -> None:
        """Take gradients in from now on.

        Args:
            trained: Whose.
            scratch: Of the thread in which backward runs.
            most: Backward passes of a step.
            room: Where they are kept; None to keep them where autograd put them.
        """
        self._trained = trained
        self._room = room
        self._most = most
        self._came = [0] * len(trained)
        self.on_whole: Callable[[int], None] | None = None
        """Called with the number of each parameter whose gradients of a step have all come."""
        self._scratch = scratch
        self._kept: list[torch.Tensor | None] = [None] * len(trained)
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
            self._kept[index] = None
            self._came[index] = 0

    def _scale(self, index: int, factor: torch.Tensor | float) -> None:
        """Multiply one, in place and in the dtype that it is kept in."""
        self._present(index)
        kept = self._kept[index]
        assert isinstance(kept, torch.Tensor)
        kept.mul_(factor)

    def _present(self, index: int) -> torch.Tensor:
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
        """
        each = self._trained[index]
        if self._came[index] == self._most:
            raise UsageError(
                f"{each.name} has a gradient of {self._most} backward passes, and another one comes before step(): "
                f"memory was set aside for so many. Say how many there are: penstock.prepare(…, accumulate="
                f"{self._most + 1})"
            )
        self._came[index] += 1
        self._take_in(index, grad, each)
        if self.on_whole is not None and self._came[index] == self._most:
            self.on_whole(index)

    def _take_in(self, index: int, grad: torch.Tensor, each: Trained) -> None:
        if grad.layout is not torch.strided:
            raise UsageError(
                f"the gradient of {each.name} is sparse, and only dense ones can be streamed: make its embedding with "
                "sparse=False"
            )
        flat = _as_in_memory(grad.detach(), each)
        kept = self._kept[index]
        if kept is None:
            self._kept[index] = flat.cpu() if self._room is None else self._room.put(index, flat)
            return
        if kept.dtype != torch.float32:
            kept = kept.to(torch.float32)
        accumulate(kept, flat.cpu(), first=False, scratch=self._scratch)
        self._kept[index] = kept

    def pop(self, index: int) -> torch.Tensor:
        """One that is there, flat and in host memory. It is not kept."""
        gradient, self._kept[index] = self._kept[index], None
        assert gradient is not None
        return gradient

    def take(self) -> list[torch.Tensor | None]:
        """All of them, flat and in host memory; None where no backward reached a parameter. None is kept.

        Raises:
            UsageError: one was put into `.grad` by hand, and does not fit what else is kept.
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
        kept, self._kept = self._kept, [None] * len(self._trained)
        self._came = [0] * len(self._trained)
        return kept

    def clear(self) -> None:
        """Forget all of them."""
        for index, each in enumerate(self._trained):
            self._settle(index)
            each.parameter.grad = None
        self._kept = [None] * len(self._trained)
        self._came = [0] * len(self._trained)
        self._used = [None] * len(self._trained)
        self._uncleared.clear()

    @property
    def nbytes(self) -> int:
        """Of host memory, now."""
        return sum(grad.nbytes for grad in self._kept if grad is not None)

    def close(self) -> None:
        """Leave the parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()
        self.clear()
        if self._room is not None:
            self._room.close()


def _as_in_memory(grad: torch.Tensor, each: Trained) -> torch.Tensor:
    """A gradient as one row, its elements in the order in which those of the weight lie in memory."""
    if tuple(grad.stride()) != each.stride:
        ordered = torch.empty_strided(tuple(grad.shape), each.stride, dtype=grad.dtype, device=grad.device)
        grad = ordered.copy_(grad)
    return grad.as_strided((grad.numel(),), (1,))
