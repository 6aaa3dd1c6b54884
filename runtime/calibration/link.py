"""How fast the way between host and device is, each way and both ways, by size of copy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Final

import torch

from ...memory.arena import AnyArena, HostArena
from ...scheduler.curves import Curve
from ...scheduler.hardware import Link
from ..devices.base import Device
from .sampling import Clock, curve, figure, in_turns

KIB: Final = 2**10
SIZES: Final = (64 * KIB, 256 * KIB, 1024 * KIB, 4096 * KIB, 16384 * KIB, 65536 * KIB)
SAMPLE_S: Final = 0.02
"""A repetition should last so long."""
SMALL: Final = 4096
LONGEST_S: Final = 0.2
"""A link on which one copy takes longer is not measured with larger ones."""


@dataclass(frozen=True, kw_only=True)
class LinkProbe:
    """Measures one link. Times are the host's, until it knows that the last copy is done: what the executor sees.

    Args:
        device: At the end of the link.
        host: Its host arena, touched.
        target: Its device arena, as large.
        clock: Seconds since any moment.
    """

    device: Device
    host: HostArena
    target: AnyArena
    clock: Clock = perf_counter

    def measure(self, *, seconds: float, sizes: Sequence[int] = SIZES) -> Link:
        """The link in figures, in about `seconds`.

        Args:
            seconds: For all of it.
            sizes: Of copies, in bytes; those that the arenas do not hold are left out.
        """
        fitting = [size for size in sizes if size <= self.host.nbytes // 2]
        pageable = self._pageable_curves(fitting, seconds * 0.35)
        share = seconds * (0.3 if pageable else 0.45)
        down, up = self._curve(self._down, fitting, share), self._curve(self._up, fitting, share)
        return Link(
            h2d=down,
            d2h=up,
            h2d_pageable=pageable[0] if pageable else None,
            d2h_pageable=pageable[1] if pageable else None,
            duplex=self._duplex(down.y[-1], up.y[-1], seconds * 0.05),
            latency_s=self._latency(),
        )

    def _curve(self, copies: Callable[[int, int], None], sizes: Sequence[int], seconds: float) -> Curve:
        points: dict[float, Callable[[], float]] = {}
        for size in sizes:
            self._rate(copies, size, 1)
            once = self._rate(copies, size, 1)
            points[size] = partial(self._rate, copies, size, max(1, min(round(SAMPLE_S * once / size), 200)))
            if size / once > LONGEST_S:
                break
        return curve(in_turns(points, seconds=seconds, clock=self.clock))

    def _rate(self, copies: Callable[[int, int], None], size: int, count: int) -> float:
        start = self.clock()
        copies(size, count)
        return size * count / (self.clock() - start)

    def _down(self, size: int, count: int) -> None:
        self._enqueue_down(size, count)
        self.device.wait(self.device.copied())

    def _up(self, size: int, count: int) -> None:
        self._enqueue_up(size, count)
        self.device.wait(self.device.copied_back())

    def _enqueue_down(self, size: int, count: int) -> None:
        for number in range(count):
            at = self._place(number, size)
            self.device.copy(self.host, at, self.target, at, size)

    def _enqueue_up(self, size: int, count: int) -> None:
        half = self.host.nbytes // 2  # the other half of both arenas, so that nothing waits for a copy the other way
        for number in range(count):
            at = half + self._place(number, size)
            self.device.copy_back(self.target, at, self.host, at, size)

    def _place(self, number: int, size: int) -> int:
        return number % (self.host.nbytes // 2 // size) * size

    def _duplex(self, down: float, up: float, seconds: float) -> float:
        """Both ways so many bytes that each alone would take as long; what each has left of its rate."""
        size = min(2**20, self.host.nbytes // 2)
        counts = [max(1, round(SAMPLE_S * rate / size)) for rate in (down, up)]
        alone = max(counts[0] * size / down, counts[1] * size / up)

        def both() -> float:
            start = self.clock()
            # Piece by piece: where starting a copy takes long, one direction would otherwise be done before the other.
            left = list(counts)
            while any(left):
                if left[0]:
                    self._enqueue_down(size, 1)
                    left[0] -= 1
                if left[1]:
                    self._enqueue_up(size, 1)
                    left[1] -= 1
            self.device.wait(self.device.copied())
            self.device.wait(self.device.copied_back())
            return self.clock() - start

        return min(1.0, alone / in_turns({1: both}, seconds=seconds, clock=self.clock)[1].value)

    def _latency(self, copies: int = 32) -> float:
        size = min(SMALL, self.host.nbytes // 2)
        taken = [size / self._rate(self._down, size, 1) for _ in range(copies)]
        return figure(taken).value

    def _pageable_curves(self, sizes: Sequence[int], seconds: float) -> tuple[Curve, Curve] | None:
        """From and to memory that CUDA has not locked; None where there is no such difference."""
        if self.device.torch_device.type != "cuda":
            return None
        place = HostArena(self.host.nbytes // 2, tier="measuring")
        try:
            ctypes.memset(place.address, 1, place.nbytes)
            plain = torch.frombuffer(place.buffer, dtype=torch.uint8)
            there = self.device.tensor(self.target)

            def move(back: bool, size: int, count: int) -> None:
                for _ in range(count):
                    if back:
                        plain[:size].copy_(there[:size])
                    else:
                        there[:size].copy_(plain[:size])
                torch.cuda.synchronize(self.device.torch_device)

            found = [self._curve(partial(move, back), sizes, seconds / 2) for back in (False, True)]
        finally:
            place.close()
        return found[0], found[1]


def measure_link(
    device: Device, *, nbytes: int, seconds: float, clock: Clock = perf_counter, sizes: Sequence[int] = SIZES
) -> Link:
    """The link of a device.

    Args:
        device: With memory of its own.
        nbytes: Of each of the two arenas that copies go between.
        seconds: About so long.
        clock: Seconds since any moment.
        sizes: Of copies, in bytes; those above half of `nbytes` are left out.

    Raises:
        DoesNotFitError: the device has no such room.
    """
    assert device.separate, device.name
    host = device.host_arena(nbytes)
    try:
        host.poison(host.cut(nbytes))  # touch the pages
        target = device.device_arena(nbytes)
        try:
            device.copy(host, 0, target, 0, nbytes)
            device.wait(device.copied())
            return LinkProbe(device=device, host=host, target=target, clock=clock).measure(seconds=seconds, sizes=sizes)
        finally:
            target.close()
    finally:
        host.close()
