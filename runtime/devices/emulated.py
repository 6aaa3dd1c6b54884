"""A CPU machine that keeps a separate device arena: real copies over links of a stated rate.

It exists so that three-tier logic, overlap and plans can be tested with real clocks where there is no GPU. Each stream
is a worker thread with a queue, so copies are as asynchronous as on a GPU and the same ordering mistakes show.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...memory.arena import AnyArena, HostArena, Slot
from ...memory.throttle import Throttle
from ...scheduler.mover import Event

PIECE = 1 << 20
"""A throttled copy is cut into pieces of this size, so that the link's rate holds over short times too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Rates of the emulated links in bytes per second; None is unlimited."""

    h2d: float | None = None
    d2h: float | None = None
    disk: float | None = None


class _Stream:
    """A queue of operations carried out in order by one thread."""

    def __init__(self, name: str, rate: float | None) -> None:
        self._throttle = None if rate is None else Throttle(rate)
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"penstock-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (operation := self._queue.get()) is not None:
            operation()

    def put(self, operation: Callable[[], None]) -> None:
        self._queue.put(operation)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        def run() -> None:
            for at in range(0, nbytes, PIECE):
                size = min(PIECE, nbytes - at)
                passed = None if self._throttle is None else self._throttle.reserve(size)
                ctypes.memmove(target + at, source + at, size)
                if self._throttle is not None and passed is not None:
                    self._throttle.wait_until(passed)

        self.put(run)

    def record(self) -> threading.Event:
        event = threading.Event()
        self.put(event.set)
        return event

    def wait_for(self, event: Event) -> None:
        if isinstance(event, threading.Event) and not event.is_set():
            self.put(lambda: _wait_for(event))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()


class EmulatedDevice:
    """A device whose memory is a second arena in host memory.

    Args:
        rates: Of the links.
    """

    name = "emulated"
    separate = True

    def __init__(self, rates: Rates) -> None:
        self.torch_device = torch.device("cpu")
        self.rates = rates
        self.disk_throttle = None if rates.disk is None else Throttle(rates.disk)
        self._down = _Stream("h2d", rates.h2d)
        self._up = _Stream("d2h", rates.d2h)

    def host_arena(self, nbytes: int) -> HostArena:
        """Plain host memory."""
        return HostArena(nbytes)

    def device_arena(self, nbytes: int) -> AnyArena:
        """Host memory that plays the device's."""
        return HostArena(nbytes, tier="device")

    def tensor(self, arena: AnyArena) -> torch.Tensor:
        """The whole arena as one flat uint8 tensor."""
        assert isinstance(arena, HostArena)
        return torch.frombuffer(arena.buffer, dtype=torch.uint8)

    def available_nbytes(self) -> int | None:
        """An emulated device has only what its budget names."""
        return None

    def copy(self, source: HostArena, start: int, target: AnyArena, offset: int, nbytes: int) -> None:
        """Enqueue host → device."""
        assert isinstance(target, HostArena)
        self._down.copy(target.address + offset, source.address + start, nbytes)

    def copy_back(self, source: AnyArena, start: int, target: HostArena, offset: int, nbytes: int) -> None:
        """Enqueue device → host."""
        assert isinstance(source, HostArena)
        self._up.copy(target.address + offset, source.address + start, nbytes)

    def copy_out(self, source: torch.Tensor, target: HostArena, offset: int, after: Event) -> Event:
        """Enqueue a tensor → host. One link has one rate, so this takes its turn among blocks."""
        self._up.wait_for(after)
        self._up.copy(target.address + offset, source.data_ptr(), source.nbytes)
        return self._up.record()

    def copy_in(self, source: HostArena, start: int, target: torch.Tensor, after: Event) -> Event:
        """Enqueue host → a tensor, likewise."""
        self._down.wait_for(after)
        self._down.copy(target.data_ptr(), source.address + start, target.nbytes)
        return self._down.record()

    def copies_wait(self, event: Event) -> None:
        """Make later copies wait for an event."""
        self._down.wait_for(event)

    def copied(self) -> Event:
        """An event after every copy enqueued so far."""
        return self._down.record()

    def copied_back(self) -> Event:
        """The same for device → host."""
        return self._up.record()

    def computed(self) -> Event:
        """CPU kernels have run when their call returns."""
        return None

    def compute_waits(self, event: Event) -> None:
        """The computing thread itself waits."""
        self.wait(event)

    def wait(self, event: Event) -> None:
        """Wait on the host."""
        if isinstance(event, threading.Event):
            event.wait()

    def poison(self, arena: AnyArena, offset: int, nbytes: int) -> None:
        """Fill a range with NaN, before later copies."""
        slot = Slot(arena=arena, offset=offset, nbytes=nbytes)
        if arena.tier == "device":
            self._down.put(lambda: arena.poison(slot))
        else:
            arena.poison(slot)

    def close(self) -> None:
        """Stop the streams."""
        self._down.close()
        self._up.close()


def _wait_for(event: threading.Event) -> None:
    event.wait()
