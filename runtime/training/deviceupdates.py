"""Shards that are updated on a device apart: they go there, are changed, and come back, several at a time.

Per element and way over the link: master, states and gradient in, master, states and weight out. The arithmetic is the
same torch operations as on the CPU. On a CUDA device the last bit of a result may be another: its kernels contract a
product and a sum into one rounding where the CPU's do not, or the other way round. The bits are then those of
`torch.optim.AdamW(foreach=False)` on that device, given the same gradients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import torch

from ...kernels.optimizer import Clip, Optimizer
from ...kernels.scratch import GRAIN, SUBCHUNK, Scratch
from ...memory.arena import round_up
from ..devices.base import Device, Lane

LANES: Final = 3
"""Shards on their way at a time: one that goes, one that is changed, one that comes back."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Change:
    """What is to be done with a part of a shard. Tensors are in host memory."""

    at: int
    """Where it begins in the arrays."""
    gradient: torch.Tensor
    """Flat."""
    hyper: Any
    step: int
    weights: torch.Tensor
    """Flat; gets the new master, rounded."""


class DeviceUpdates:
    """Lanes, with room on the device for a shard each.

    Args:
        device: Where.
        kernel: The optimizer's mathematics.
        elements: Of the largest shard.
        arrays: Of a shard.
    """

    def __init__(self, device: Device, kernel: Optimizer[Any], *, elements: int, arrays: int) -> None:
        self._device, self._kernel = device, kernel
        self._array_nbytes = round_up(4 * elements)
        self.arena = device.device_arena(LANES * (arrays + 2) * self._array_nbytes)
        place = device.torch_device
        size = SUBCHUNK if place.type == "cpu" else _at_once(elements)  # a device has no cache to stay in
        scratches = [Scratch.of(size, None if place.type == "cpu" else place) for _ in range(LANES)]
        self._lanes: list[Lane] = [device.lane() for _ in range(LANES)]
        self._free = deque(
            (lane, scratch, self._rows(number, arrays + 2))
            for number, (lane, scratch) in enumerate(zip(self._lanes, scratches, strict=True))
        )

    @staticmethod
    def needed_nbytes(elements: int, arrays: int) -> int:
        """Of device memory, at most."""
        return LANES * ((arrays + 2) * round_up(4 * elements) + 12 * _at_once(elements))

    def _rows(self, number: int, rows: int) -> list[torch.Tensor]:
        """Room for arrays, gradients and weights, as bytes: an element of each begins at four times its number."""
        raw = self._device.tensor(self.arena)
        first = number * rows
        return [raw[(first + row) * self._array_nbytes :][: self._array_nbytes] for row in range(rows)]

    def begin(self, arrays: Sequence[torch.Tensor], changes: Sequence[Change], clip: Clip | None) -> Callable[[], None]:
        """Begin to change a shard, whose arrays, gradients and weights are left alone until what is returned returns.

        No more than LANES at a time.

        Args:
            arrays: In host memory, fp32 [elements] each: masters and states. They get the new ones.
            changes: To be made.
            clip: What gradients are multiplied by.
        """
        lane, scratch, rows = free = self._free.popleft()

        def finish() -> None:
            try:
                lane.wait()
            finally:
                self._free.append(free)

        try:
            self._enqueue(lane, scratch, rows, arrays, changes, clip)
        except BaseException:
            with suppress(Exception):  # until then it may touch what it was given
                finish()
            raise
        return finish

    def _enqueue(
        self,
        lane: Lane,
        scratch: Scratch,
        rows: Sequence[torch.Tensor],
        arrays: Sequence[torch.Tensor],
        changes: Sequence[Change],
        clip: Clip | None,
    ) -> None:
        count = len(arrays[0])
        there = [row[: 4 * count].view(torch.float32) for row in rows[: len(arrays)]]
        for source, target in zip(arrays, there, strict=True):
            lane.fetch(source, target)
        sent: list[tuple[torch.Tensor, torch.Tensor]] = []
        for change in changes:
            gradient, weights = (
                row[4 * change.at :][: each.nbytes].view(each.dtype)
                for row, each in zip(rows[-2:], (change.gradient, change.weights), strict=True)
            )
            lane.fetch(change.gradient, gradient)
            lane.compute(_update(self._kernel, change, there, gradient, weights, scratch, clip))
            sent.append((weights, change.weights))
        for source, target in (*zip(there, arrays, strict=True), *sent):
            lane.send(source, target)

    def close(self) -> None:
        """Give the memory back. Nothing is under way."""
        for lane in self._lanes:
            lane.close()
        self._free.clear()
        self.arena.close()


def _at_once(elements: int) -> int:
    """Elements of a scratch for shards of so many."""
    return round_up(max(SUBCHUNK, elements), GRAIN)


def _update(
    kernel: Optimizer[Any],
    change: Change,
    arrays: Sequence[torch.Tensor],
    gradient: torch.Tensor,
    weights: torch.Tensor,
    scratch: Scratch,
    clip: Clip | None,
) -> Callable[[], None]:
    here = slice(change.at, change.at + len(gradient))

    def work() -> None:
        kernel.update(
            arrays[0][here],
            [array[here] for array in arrays[1:]],
            gradient,
            change.hyper,
            step=change.step,
            scratch=scratch,
            out=weights,
            clip=clip,
        )

    return work
