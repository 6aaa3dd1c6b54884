"""Places for gradients in host memory, made once, which gradients of every step are copied to."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from itertools import accumulate as accumulated
from typing import Protocol

import torch

from ...memory.arena import HostArena, round_up
from ...memory.image import ALIGN
from ..devices.base import Device
from .trained import Trained, gradient_dtype


class Places(Protocol):
    """Gives places to gradients."""

    @property
    def arena(self) -> HostArena:
        """What they are in."""

    def place(self, index: int) -> torch.Tensor | None:
        """What lies in that of a parameter, flat, in the dtype that it is kept in; None where there is none now."""

    def release(self, block: int) -> None:
        """The gradients of a block have been used."""

    def close(self) -> None:
        """Give the memory back."""


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

    def place(self, index: int) -> torch.Tensor | None:
        """Its own; None for one that is elsewhere."""
        return _at(self.arena, self._offsets[index], self._sizes[index], self._dtypes[index])

    def release(self, block: int) -> None:
        """It is written to no sooner than in the next step."""

    def close(self) -> None:
        """Give the memory back."""
        self.arena.close()


class GradientPool:
    """Places for the gradients of a few blocks at a time, and always for those of the small tensors.

    For updates that begin in backward, of a device apart, whose gradients come to pinned memory. A block gets a slot
    with its first gradient, and keeps it until it has been updated.

    Args:
        trained: All parameters, which keep their dtypes.
        device: That computes.
        blocks: The block of each parameter.
        slots: How many blocks.
        small: The block of the small tensors.
    """

    def __init__(
        self, trained: Sequence[Trained], device: Device, blocks: Sequence[int], *, slots: int, small: int
    ) -> None:
        self._trained, self._blocks, self._small = trained, blocks, small
        self._within: list[int] = []
        filled: dict[int, int] = {}
        for each, block in zip(trained, blocks, strict=True):
            self._within.append(filled.get(block, 0))
            filled[block] = self._within[-1] + round_up(each.elements * each.parameter.itemsize, ALIGN)
        self._slot_nbytes = max((nbytes for block, nbytes in filled.items() if block != small), default=0)
        slots = min(slots, len(filled.keys() - {small}))
        self._free = [number * self._slot_nbytes for number in range(slots)]
        self._slots: dict[int, int] = {small: slots * self._slot_nbytes}
        self._lock = threading.Lock()
        self.arena = device.host_arena(max(slots * self._slot_nbytes + filled.get(small, 0), 1), tier="gradients")

    @staticmethod
    def nbytes(sizes: Sequence[int], blocks: Sequence[int], *, slots: int, small: int) -> int:
        """What it takes, for gradients of these sizes."""
        filled: dict[int, int] = {}
        for size, block in zip(sizes, blocks, strict=True):
            filled[block] = filled.get(block, 0) + round_up(size, ALIGN)
        beside = filled.pop(small, 0)
        return beside + min(slots, len(filled)) * max(filled.values(), default=0)

    def place(self, index: int) -> torch.Tensor | None:
        """In the slot of its block; None where no slot is free."""
        block, each = self._blocks[index], self._trained[index]
        with self._lock:
            if block not in self._slots:
                if not self._free:
                    return None
                self._slots[block] = self._free.pop()
            start = self._slots[block]
        dtype = each.parameter.dtype
        return _at(self.arena, start + self._within[index], each.elements * dtype.itemsize, dtype)

    def release(self, block: int) -> None:
        """Its slot may hold others'."""
        with self._lock:
            if block != self._small and block in self._slots:
                self._free.append(self._slots.pop(block))

    def close(self) -> None:
        """Give the memory back."""
        self.arena.close()


def _at(arena: HostArena, offset: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor | None:
    if not nbytes:
        return None
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
