"""Gradients as they leave backward: taken from each parameter as soon as they are whole, added up, and kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate as accumulated
from typing import Any

import torch
from torch import nn

from ...kernels.accumulation import accumulate
from ...kernels.norms import gradient_norm
from ...kernels.scratch import Scratch
from ...memory.arena import HostArena, round_up
from ...memory.errors import StallError, UsageError
from ...memory.image import ALIGN
from .spill import GradientSpill
from .taken import TakenGradient

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, kw_only=True, eq=False)
class SpilledGradient:
    """A gradient that is on disk."""

    elements: int
    norm: torch.Tensor | None
    """Of all of it in fp32, 0-dim; None while a further backward may add to it."""


Gradient = torch.Tensor | SpilledGradient
"""Of one step: flat and in host memory, or on disk."""


class WideGradient:
    """One gradient in fp32, for as long as no other one is asked for.

    One buffer for all of them: of those that are allocated anew, the norms, small and long-lived, keep malloc from
    giving half back until the next step.
    """

    def __init__(self, elements: int) -> None:
        """`elements`: of the longest. Memory is taken on first use."""
        self._elements = elements
        self._buffer: torch.Tensor | None = None

    def room(self, elements: int) -> torch.Tensor:
        """The buffer's first elements, fp32."""
        if self._buffer is None:
            self._buffer = torch.empty(self._elements, dtype=torch.float32)
        return self._buffer[:elements]

    def of(self, gradient: torch.Tensor) -> torch.Tensor:
        """A flat gradient in fp32, in host memory; itself where it is that."""
        if gradient.dtype == torch.float32 and gradient.device.type == "cpu":
            return gradient
        return self.room(len(gradient)).copy_(gradient)


class GradientRoom:
    """A place for the gradient of each of some parameters, made once.

    Kept where autograd puts them, between activations that come and go, gradients leave holes that malloc cannot use:
    100 MiB and more of a few hundred. A place is used again in the next step: by then the forward has waited for the
    update that used it.
    """

    def __init__(self, trained: Sequence[Trained], *, wide: bool, elsewhere: Collection[int] = ()) -> None:
        """Make it.

        Args:
            trained: All parameters.
            wide: In fp32, for gradients that are added up; else in the dtype of the parameter.
            elsewhere: The numbers of those that need no place here.
        """
        self._dtypes = [gradient_dtype(each, wide=wide) for each in trained]
        sizes = [
            0 if index in elsewhere else each.elements * dtype.itemsize
            for index, (each, dtype) in enumerate(zip(trained, self._dtypes, strict=True))
        ]
        self._offsets = list(accumulated((round_up(size, ALIGN) for size in sizes), initial=0))
        self._sizes = sizes
        self.arena = HostArena(max(self._offsets[-1], 1), tier="gradients")

    def put(self, index: int, flat: torch.Tensor) -> torch.Tensor:
        """A copy of a gradient in its place."""
        if not self._sizes[index]:
            return flat.cpu()
        raw = self.arena.view(self._offsets[index], self._sizes[index])
        return torch.frombuffer(raw, dtype=self._dtypes[index]).copy_(flat)

    def close(self) -> None:
        """Give the memory back."""
        self.arena.close()


def gradient_dtype(each: Trained, *, wide: bool) -> torch.dtype:
    """What the gradient of a parameter is kept in."""
    return torch.float32 if wide else each.parameter.dtype


class Gradients:
    """The gradients of one step.

    A gradient of one backward keeps its dtype; a second one is added in fp32, and so is every further one. Between
    passes `.grad` shows a `TakenGradient`; who removes it (`model.zero_grad()`) removes the gradient. It stays there
    after the step, as in PyTorch: a backward that finds it was to add to a gradient which is gone.
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        scratch: Scratch,
        *,
        most: int = 1,
        room: GradientRoom | None = None,
        spill: GradientSpill | None = None,
    ) -> None:
        """Take gradients in from now on.

        Args:
            trained: Whose.
            scratch: Of the thread in which backward runs.
            most: Backward passes of a step.
            room: Where they are kept; None to keep them where autograd put them.
            spill: Where those go that are not kept.
        """
        self._trained = trained
        self._room = room
        self.spill = spill
        """Where those go that are not kept."""
        self.wide = WideGradient(max(each.elements for each in trained))
        self._most = most
        self._came = [0] * len(trained)
        self.on_whole: Callable[[int], None] | None = None
        """Called with the number of each parameter whose gradients of a step have all come."""
        self._scratch = scratch
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
        flat = self._present(index)
        flat.mul_(factor.to(flat.device) if isinstance(factor, torch.Tensor) else factor)
        if isinstance(self._kept[index], SpilledGradient):  # that was a copy
            assert self.spill is not None
            norm = gradient_norm(self.wide.of(flat))
            self.spill.put(index, flat)
            self._kept[index] = SpilledGradient(elements=len(flat), norm=norm)

    def _present(self, index: int) -> torch.Tensor:
        kept = self._kept[index]
        if kept is None:
            raise UsageError(
                f"the gradient of {self._trained[index].name} has gone into an update already: clip before step(). "
                'Where updates begin in backward, gradients cannot be clipped: leave updates="backward" out'
            )
        if isinstance(kept, SpilledGradient):
            assert self.spill is not None
            return self.spill.get(index)
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
        if self.spill is not None and index in self.spill:
            # where updates begin in backward, one that is whole goes to its update from memory
            goes = self.on_whole is not None and self._came[index] == self._most
            send = self._bring if goes else self._send
            self._kept[index] = send(index, flat, self.spill, first=kept is None)
            return
        assert not isinstance(kept, SpilledGradient)
        if kept is None:
            self._kept[index] = flat.cpu() if self._room is None else self._room.put(index, flat)
            return
        if kept.dtype != torch.float32:
            kept = kept.to(torch.float32)
        accumulate(kept, flat.cpu(), first=False, scratch=self._scratch)
        self._kept[index] = kept

    def _send(self, index: int, flat: torch.Tensor, spill: GradientSpill, *, first: bool) -> SpilledGradient:
        """Send one to disk, with what has come of it before. The norm is taken here, while it is in memory."""
        if first and self._most > 1:
            flat = self.wide.of(flat)  # as what is kept in memory is, where several passes may come
        if not first:
            total = self.wide.room(len(flat))
            spill.load(index, total)
            accumulate(total, flat.cpu(), first=False, scratch=self._scratch)
            flat = total
        norm = gradient_norm(self.wide.of(flat)) if self._came[index] == self._most else None
        spill.put(index, flat)
        return SpilledGradient(elements=len(flat), norm=norm)

    def _bring(self, index: int, flat: torch.Tensor, spill: GradientSpill, *, first: bool) -> torch.Tensor:
        """The last of one in memory, with what has come of it before."""
        if first:
            return flat.cpu()
        total = torch.empty(len(flat), dtype=torch.float32)
        spill.load(index, total)
        accumulate(total, flat.cpu(), first=False, scratch=self._scratch)
        return total

    def kept_nbytes(self, index: int) -> int:
        """What one takes until its update, in memory or on disk."""
        each = self._trained[index]
        return each.elements * gradient_dtype(each, wide=self._most > 1).itemsize

    def pop(self, index: int) -> torch.Tensor:
        """One that is there, flat and in host memory. It is not kept."""
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
        if self.spill is not None:
            try:
                self.spill.settle()
                self._end_norms(self.spill)
            except Exception:
                self.clear()
                raise
        kept, self._kept = self._kept, [None] * len(self._trained)
        self._came = [0] * len(self._trained)
        return kept

    def _end_norms(self, spill: GradientSpill) -> None:
        """Take the norms of those that could have been of more backward passes than they are."""
        for index, kept in enumerate(self._kept):
            if isinstance(kept, SpilledGradient) and kept.norm is None:
                whole = self.wide.room(kept.elements)
                spill.load(index, whole)
                self._kept[index] = replace(kept, norm=gradient_norm(whole))

    def clear(self) -> None:
        """Forget all of them."""
        for index, each in enumerate(self._trained):
            self._settle(index)
            each.parameter.grad = None
        self._kept = [None] * len(self._trained)
        self._came = [0] * len(self._trained)
        self._used = [None] * len(self._trained)
        self._uncleared.clear()
        if self.spill is not None:
            self.spill.forget()

    @property
    def written_nbytes(self) -> int:
        """What a step of all its backward passes writes of them."""
        if self.spill is None:
            return 0
        passes = self._most if self.on_whole is None else self._most - 1  # the last one goes into the update
        return passes * self.spill.nbytes

    @property
    def nbytes(self) -> int:
        """Of host memory, now."""
        return sum(grad.nbytes for grad in self._kept if isinstance(grad, torch.Tensor))

    def close(self) -> None:
        """Leave the parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()
        try:
            self.clear()
        except StallError as error:  # the rest is to be given back all the same
            logger.warning("%s", error)
        if self._room is not None:
            self._room.close()
        if self.spill is not None:
            self.spill.close()


def _as_in_memory(grad: torch.Tensor, each: Trained) -> torch.Tensor:
    """A gradient as one row, its elements in the order in which those of the weight lie in memory."""
    if tuple(grad.stride()) != each.stride:
        ordered = torch.empty_strided(tuple(grad.shape), each.stride, dtype=grad.dtype, device=grad.device)
        grad = ordered.copy_(grad)
    return grad.as_strided((grad.numel(),), (1,))
