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
from .base import Lane

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
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"penstock-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (operation := self._queue.get()) is not None:
            operation()

    def put(self, operation: Callable[[], None]) -> None:
        with self._lock:
            if not self._closed:
                self._queue.put(operation)
                return
        operation()  # whoever is ending must not wait for ever

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
        with self._lock:
            self._closed = True
            self._queue.put(None)
        self._thread.join()


class _Lane:
    """A lane: a thread that waits for its own copies."""

    def __init__(self, down: _Stream, up: _Stream) -> None:
        self._down, self._up = down, up
        self._own = _Stream("lane", None)
        self._error: Exception | None = None

    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Over the link to the device."""
        self.compute(lambda: self._over(self._down, source, target))

    def send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Over the link from it."""
        self.compute(lambda: self._over(self._up, source, target))

    @staticmethod
    def _over(link: _Stream, source: torch.Tensor, target: torch.Tensor) -> None:
        _copy_tensor(link, source, target)
        link.record().wait()

    def compute(self, work: Callable[[], None]) -> None:
        """By the thread, unless what came before has failed."""

        def run() -> None:
            if self._error is None:
                try:
                    work()
                except Exception as error:  # it is raised in the thread that waits
                    self._error = error

        self._own.put(run)

    def wait(self) -> None:
        """For the thread."""
        self._own.record().wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """End the thread."""
        self._own.close()


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

    def host_arena(self, nbytes: int, *, tier: str = "host") -> HostArena:
        """Plain host memory."""
        return HostArena(nbytes, tier=tier)

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

    def send(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Enqueue device → host of a tensor. What computed it has run."""
        _copy_tensor(self._up, source, target)
        return self._up.record()

    def lane(self) -> Lane:
        """A thread, whose copies pass over the links like all others."""
        return _Lane(self._down, self._up)

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

    def passed(self, event: Event) -> bool:
        """Whether an event has completed."""
        return not isinstance(event, threading.Event) or event.is_set()

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


def _copy_tensor(stream: _Stream, source: torch.Tensor, target: torch.Tensor) -> None:
    assert source.dtype == target.dtype
    assert source.shape == target.shape
    assert source.is_contiguous()
    assert target.is_contiguous()
    stream.copy(target.data_ptr(), source.data_ptr(), source.nbytes)


def _wait_for(event: threading.Event) -> None:
    event.wait()
