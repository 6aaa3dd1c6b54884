"""How long work takes on a device: by the host's clock on a CPU, by the GPU's own events there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import torch

from .sampling import Clock

_cuda: Final[Any] = torch.cuda
"""For calls that torch leaves untyped."""


class Timer(Protocol):
    """Measures what a device does."""

    def seconds(self, work: Callable[[], object]) -> float:
        """How long the device is busy with what `work` starts, from the first operation to the end of the last."""
        ...


class HostTimer:
    """For work that is done when its call returns.

    Args:
        clock: Seconds since any moment.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds that the call takes."""
        start = self._clock()
        work()
        return self._clock() - start


class CudaTimer:
    """For work that is enqueued to the current stream of a GPU.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds on the GPU's clock between what was enqueued before `work` and the end of what it enqueues."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device)
            begin, end = _cuda.Event(enable_timing=True), _cuda.Event(enable_timing=True)
            torch.cuda.synchronize(self._device)  # nothing of the repetition before may reach into this one
            begin.record(stream)
            work()
            end.record(stream)
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3  # it is in milliseconds


class SynchronizingTimer:
    """For what the host takes to start work and to see its end.

    Args:
        device: A GPU.
        clock: Seconds since any moment.
    """

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter) -> None:
        self._device = device
        self._clock = clock

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds on the host's clock until the device has come to rest again."""
        torch.cuda.synchronize(self._device)
        start = self._clock()
        work()
        torch.cuda.synchronize(self._device)
        return self._clock() - start


def device_timer(device: torch.device) -> Timer:
    """The timer for what computes there."""
    return CudaTimer(device) if device.type == "cuda" else HostTimer()


def host_timer(device: torch.device) -> Timer:
    """The timer for what the host spends on it."""
    return SynchronizingTimer(device) if device.type == "cuda" else HostTimer()
