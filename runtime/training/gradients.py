"""Gradients as they leave backward: taken from each parameter as soon as they are whole, added up, and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...kernels.accumulation import accumulate
from ...kernels.norms import gradient_norm
from ...kernels.scratch import Scratch
from ...memory.errors import UsageError
from .departures import Departures
from .gradientroom import Places, WideGradient
from .spill import GradientSpill
from .taken import TakenGradient
from .trained import Trained


@dataclass(frozen=True, kw_only=True, eq=False)
class SpilledGradient:
    """A gradient that is on disk."""

    elements: int


Gradient = torch.Tensor | SpilledGradient
"""Of one step: flat and in host memory, or on disk."""


class Gradients:
    """The gradients of one step.

    A gradient of one backward keeps its dtype; a second one is added in fp32, and so is every further one. Between
    passes `.grad` shows a `TakenGradient`; who removes it (`model.zero_grad()`) removes the gradient. It stays there
    after the step, as in PyTorch: a backward that finds it was to add to a gradient which is gone.

    From a device apart gradients leave while backward goes on (`Departures`): what is kept of one may not be there yet.
    Everything here waits for what it needs; who got it from `pop` has to (`wait`).
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        scratch: Scratch,
        *,
        most: int = 1,
        room: Places | None = None,
        spill: GradientSpill | None = None,
        departures: Departures | None = None,
    ) -> None:
        """Take gradients in from now on.

        Args:
            trained: Whose.
            scratch: Of the thread in which they are taken in: that of backward, or of `departures`.
            most: Backward passes of a step.
            room: Where they are kept; None to keep them where autograd put them, which needs one memory for all.
            spill: Where those go that are not kept.
            departures: From a device apart.
        """
        self._trained = trained
        self._room = room
        self._spill = spill
        self._departures = departures
        self._norms: dict[int, torch.Tensor] = {}
        """Of whole gradients in fp32, 0-dim, as far as they were taken on the way."""
        self._norms_taken: dict[int, torch.Tensor] = {}
        """Those that belong to what `take` gave last."""
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
            self._all_arrived()
            self._kept[index] = None
            self._came[index] = 0
            self._norms.pop(index, None)

    def _all_arrived(self) -> None:
        """Wait until what left a device apart is where it is kept."""
        if self._departures is not None:
            self._departures.settle()

    def wait(self, index: int) -> None:
        """Wait until the gradient of a parameter is where it is kept.

        Raises:
            Exception: what came in its way.
        """
        if self._departures is not None:
            self._departures.wait(index)

    def _scale(self, index: int, factor: torch.Tensor | float) -> None:
        """Multiply one, in place and in the dtype that it is kept in."""
        flat = self._present(index)
        flat.mul_(factor.to(flat.device) if isinstance(factor, torch.Tensor) else factor)
        self._norms.pop(index, None)
        if isinstance(self._kept[index], SpilledGradient):  # that was a copy
            assert self._spill is not None
            self._norms[index] = gradient_norm(self.wide.of(flat))
            self._spill.put(index, flat)

    def _present(self, index: int) -> torch.Tensor:
        self._all_arrived()
        kept = self._kept[index]
        if kept is None:
            raise UsageError(
                f"the gradient of {self._trained[index].name} has gone into an update already: clip before step(). "
                'Where updates begin in backward, gradients cannot be clipped: leave updates="backward" out'
            )
        if isinstance(kept, SpilledGradient):
            assert self._spill is not None
            return self._spill.get(index)
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
        first, whole = self._kept[index] is None, self._came[index] == self._most
        if self._departures is not None:
            self._depart(index, flat, self._departures, first=first, whole=whole)
        else:
            self._keep(index, flat, first=first, whole=whole)

    def _keep(self, index: int, flat: torch.Tensor, *, first: bool, whole: bool) -> None:
        """Take in what was made where it is kept."""
        if self._is_spilled(index):
            self._kept[index] = SpilledGradient(elements=len(flat))
            self._send(index, flat, first=first, whole=whole)
            return
        if first:
            place = None if self._room is None else self._room.place(index)
            self._kept[index] = flat if place is None else place.copy_(flat)
            return
        kept = self._kept[index]
        assert isinstance(kept, torch.Tensor)
        if kept.dtype != torch.float32:
            kept = kept.to(torch.float32)
        accumulate(kept, flat, first=False, scratch=self._scratch)
        self._kept[index] = kept

    def _depart(self, index: int, flat: torch.Tensor, departures: Departures, *, first: bool, whole: bool) -> None:
        """Have one leave the device. Its norm is taken there, unless it is only a part of a sum."""
        if first and whole:
            self._norms[index] = gradient_norm(flat.float())
        if self._is_spilled(index):
            self._kept[index] = SpilledGradient(elements=len(flat))
            departures.through(index, flat, lambda host: self._send(index, host, first=first, whole=whole))
            return
        if first:
            place = None if self._room is None else self._room.place(index)
            if place is None:  # blocks of which some gradients do not come have all places: see docs/training.md
                self._kept[index] = flat.cpu()
                return
            self._kept[index] = place
            if place.dtype == flat.dtype:
                departures.send(index, flat, place)
                return
        total = self._kept[index]
        assert isinstance(total, torch.Tensor)
        departures.through(index, flat, lambda host: self._add_to(index, total, host, first=first, whole=whole))

    def _add_to(self, index: int, total: torch.Tensor, flat: torch.Tensor, *, first: bool, whole: bool) -> None:
        accumulate(total, flat, first=first, scratch=self._scratch)
        if whole:
            self._norms[index] = gradient_norm(total)

    def _is_spilled(self, index: int) -> bool:
        return self._spill is not None and index in self._spill

    def _send(self, index: int, flat: torch.Tensor, *, first: bool, whole: bool) -> None:
        """Send one to disk, with what has come of it before. The norm is taken here, while it is in memory."""
        assert self._spill is not None
        if first and self._most > 1:
            flat = self.wide.of(flat)  # as what is kept in memory is, where several passes may come
        if not first:
            total = self.wide.room(len(flat))
            self._spill.load(index, total)
            accumulate(total, flat, first=False, scratch=self._scratch)
            flat = total
        if whole and index not in self._norms:
            self._norms[index] = gradient_norm(self.wide.of(flat))
        self._spill.put(index, flat)

    def norm(self, index: int, gradient: Gradient) -> torch.Tensor:
        """The norm in fp32 of one that `take` gave, 0-dim; on the device, if it was taken there."""
        found = self._norms_taken.get(index)
        if found is None:
            assert isinstance(gradient, torch.Tensor)  # else it was taken when it went to disk
            found = gradient_norm(self.wide.of(gradient))
        return found

    @property
    def depart(self) -> bool:
        """Whether they are made on a device apart."""
        return self._departures is not None

    def has_norm(self, index: int) -> bool:
        """Whether the norm of a gradient of what `take` gave last was taken on the way."""
        return index in self._norms_taken

    @property
    def norms_on_the_way(self) -> list[torch.Tensor]:
        """Of those of what `take` gave last, and of what was popped before, that were taken while they left."""
        return list(self._norms_taken.values())

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
            self._all_arrived()
            if self._spill is not None:
                self._spill.settle()
                self._end_norms(self._spill)
        except Exception:
            self.clear()
            raise
        kept, self._kept = self._kept, [None] * len(self._trained)
        self._norms_taken, self._norms = self._norms, {}
        self._came = [0] * len(self._trained)
        return kept

    def _end_norms(self, spill: GradientSpill) -> None:
        """Take the norms of those that could have been of more backward passes than they are."""
        for index, kept in enumerate(self._kept):
            if isinstance(kept, SpilledGradient) and index not in self._norms:
                whole = self.wide.room(kept.elements)
                spill.load(index, whole)
                self._norms[index] = gradient_norm(whole)

    def clear(self) -> None:
        """Forget all of them."""
        for index, each in enumerate(self._trained):
            self._settle(index)
            each.parameter.grad = None
        if self._departures is not None:
            self._departures.forget()
        self._kept = [None] * len(self._trained)
        self._norms = {}
        self._came = [0] * len(self._trained)
        self._used = [None] * len(self._trained)
        self._uncleared.clear()
        if self._spill is not None:
            self._spill.forget()

    @property
    def nbytes(self) -> int:
        """Of host memory, now."""
        return sum(grad.nbytes for grad in self._kept if isinstance(grad, torch.Tensor))

    def close(self) -> None:
        """Leave the parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()
        if self._departures is not None:
            self._departures.close()
        self.clear()
        if self._room is not None:
            self._room.close()
        if self._spill is not None:
            self._spill.close()


def _as_in_memory(grad: torch.Tensor, each: Trained) -> torch.Tensor:
    """A gradient as one row, its elements in the order in which those of the weight lie in memory."""
    if tuple(grad.stride()) != each.stride:
        ordered = torch.empty_strided(tuple(grad.shape), each.stride, dtype=grad.dtype, device=grad.device)
        grad = ordered.copy_(grad)
    return grad.as_strided((grad.numel(),), (1,))
