"""Places for gradients in host memory, made once, which gradients of every step are copied to."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from itertools import accumulate as accumulated

import torch

from ...memory.arena import HostArena, round_up
from ...memory.image import ALIGN
from ..devices.base import Device
from .trained import Trained, gradient_dtype


class GradientRoom:
    """A place for the gradient of each of some parameters.

    Kept where autograd puts them, between activations that come and go, gradients leave holes that malloc cannot use:
    100 MiB and more of a few hundred. A place is used again in the next step: by then the forward has waited for the
    update that used it.

    Args:
        trained: All parameters.
        device: That computes.
        wide: In fp32, for gradients that are added up; else in the dtype of the parameter.
        elsewhere: The numbers of those that need no place here.
    """

    def __init__(
        self, trained: Sequence[Trained], device: Device, *, wide: bool, elsewhere: Collection[int] = ()
    ) -> None:
        self._dtypes = [gradient_dtype(each, wide=wide) for each in trained]
        sizes = [
            0 if index in elsewhere else each.elements * dtype.itemsize
            for index, (each, dtype) in enumerate(zip(trained, self._dtypes, strict=True))
        ]
        self._offsets = list(accumulated((round_up(size, ALIGN) for size in sizes), initial=0))
        self._sizes = sizes
        self.arena = device.host_arena(max(self._offsets[-1], 1), tier="gradients")

    def place(self, index: int) -> torch.Tensor:
        """Its own, flat, in the dtype that it is kept in; of one that is not elsewhere."""
        return _at(self.arena, self._offsets[index], self._sizes[index], self._dtypes[index])

    def close(self) -> None:
        """Give the memory back."""
        self.arena.close()


class GradientPool:
    """Places for the gradients of a few blocks at a time: whole ones that go to updates which backward begins.

    A block gets a slot with its first gradient, and keeps it until it has been updated, or they are elsewhere.

    Args:
        trained: All parameters.
        device: That computes.
        passing: The numbers of those whose gradients get places here.
        blocks: The block of each parameter.
        wide: In fp32, for sums; else in the dtype of the parameter.
        slots: How many blocks.
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        device: Device,
        *,
        passing: Collection[int],
        blocks: Sequence[int],
        wide: bool,
        slots: int,
    ) -> None:
        self._blocks = blocks
        self._dtypes = [gradient_dtype(each, wide=wide) for each in trained]
        self._nbytes = [each.elements * dtype.itemsize for each, dtype in zip(trained, self._dtypes, strict=True)]
        self._within: dict[int, int] = {}
        filled: dict[int, int] = {}
        for index in sorted(passing):
            self._within[index] = filled.get(blocks[index], 0)
            filled[blocks[index]] = self._within[index] + round_up(self._nbytes[index], ALIGN)
        slot_nbytes, count = max(filled.values()), min(slots, len(filled))
        self._free = [number * slot_nbytes for number in range(count)]
        self._slots: dict[int, int] = {}
        """Where that of a block begins."""
        self._lock = threading.Lock()
        self.arena = device.host_arena(count * slot_nbytes, tier="gradients of updates")

    def place(self, index: int) -> torch.Tensor | None:
        """In the slot of its block, flat, in the dtype that it is kept in; None where no slot is free."""
        block = self._blocks[index]
        with self._lock:
            if block not in self._slots:
                if not self._free:
                    return None
                self._slots[block] = self._free.pop()
            start = self._slots[block]
        return _at(self.arena, start + self._within[index], self._nbytes[index], self._dtypes[index])

    def release(self, block: int) -> None:
        """Its slot, if it has one, may hold others': nothing reads it any more."""
        with self._lock:
            if block in self._slots:
                self._free.append(self._slots.pop(block))

    def close(self) -> None:
        """Give the memory back."""
        self.arena.close()


def _at(arena: HostArena, offset: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(arena.view(offset, nbytes), dtype=dtype)


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
