"""CUDA: one copy stream each way, events in both directions, one registered host arena.

Ordering, written out. Streams made by torch never synchronise with the default stream by themselves, so every
dependency is an event:

* Read after write: a copy records its event on the copy stream; the compute stream waits for that event before the
  first kernel that reads the slot (`compute_waits`), and only once the event has been recorded.
* Write after read: releasing a lease records an event on the compute stream (`computed`); the copy stream waits for it
  before the next copy into the slot (`copies_wait`). With several compute streams in use an event stands for what all
  of them held when it was made, so that the latest event of a slot is enough.
* Write after write: copies and poison go through one stream, in order.
* A tensor that is sent to the host (`send`): the device → host stream waits for an event of the compute stream that
  made it. Its memory is the compute stream's own again once that stream has been made to wait for the copy's event,
  and only then does the sender let go of it. The host reads what came after a host-side wait on that event.
* A lane is one stream: its copies in, kernels and copies out follow each other. It shares no memory with other streams,
  but for the arena and the scratch it is given, which their owner's stream has left before (`wait_stream` when it is
  made); its memory in the host is left alone until `wait`, which waits on the host.
* A host slot is refilled from disk only after a host-side wait on the copy that reads it.
* New arena memory may still be read by kernels of the stream it was allocated on: the copy streams wait for that stream
  once. It goes back to torch's allocator only after the device has come to rest (`close`).

The host arena is no pinned tensor of torch's. Copies from it are asynchronous all the same: `copy_(non_blocking=True)`
between contiguous tensors of one dtype enqueues `cudaMemcpyAsync` whatever torch knows of the memory, and CUDA itself
knows that the pages are locked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Final

import torch

from ...memory.arena import POISON, AnyArena, HostArena, Slot
from ...memory.errors import DoesNotFitError
from ...memory.throttle import Throttle
from ...scheduler.mover import Event
from .base import Lane

logger = logging.getLogger(__name__)

_cuda: Final[Any] = torch.cuda
"""For calls that torch leaves untyped."""


class _DeviceArena(AnyArena):
    """One flat allocation on the device."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        super().__init__(tier="device", nbytes=max(nbytes, 4096))
        with torch.inference_mode(False):  # an inference tensor could not be written from the executor's thread
            self.data: torch.Tensor | None = torch.empty(self.nbytes, dtype=torch.uint8, device=device)

    def poison(self, slot: Slot) -> None:
        assert self.data is not None
        self.data[slot.offset : slot.offset + slot.nbytes].fill_(POISON)

    def close(self) -> None:
        self.data = None


class _RegisteredArena(HostArena):
    """A host arena that CUDA has locked and mapped, exactly as large as asked for."""

    def __init__(self, nbytes: int, device: torch.device, *, tier: str = "host") -> None:
        super().__init__(nbytes, tier=tier)
        self._device = device
        self.registered = False
        """Whether CUDA holds the pages; copies run at pageable speed otherwise."""
        with torch.inference_mode(False):
            self.data: torch.Tensor | None = torch.frombuffer(self.buffer, dtype=torch.uint8)
        self._register()

    def _register(self) -> None:
        with torch.cuda.device(self._device):
            error = _status(_cuda.cudart().cudaHostRegister(self.address, self.nbytes, 0))
        self.registered = error == 0
        if error:
            _forget_error(self._device)
            logger.warning(
                "cudaHostRegister refused %d bytes of host memory (CUDA error %d): copies will run at pageable speed. "
                "Lower the host budget, or raise the memory limit of the container.",
                self.nbytes,
                error,
            )

    def close(self) -> None:
        self.data = None  # it exports the mapping, which could not be unmapped
        if self.registered and os.getpid() == self._pid:
            self.registered = False
            error = _status(_cuda.cudart().cudaHostUnregister(self.address))
            if error:
                _forget_error(self._device)
                logger.warning("cudaHostUnregister failed for %d bytes (CUDA error %d)", self.nbytes, error)
        super().close()


def _status(result: object) -> int:
    """A `cudaError` as a number. torch's enum has names for few of them, and converts either way."""
    value = getattr(result, "value", result)
    assert isinstance(value, int), result
    return value


def _forget_error(device: torch.device) -> None:
    """Take back the error of a call that was refused: CUDA keeps it, and the next kernel launch would raise it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)


class _Lane:
    """A lane: a stream of its own, so that nothing it does waits for anything but what it did before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = _cuda.Stream(device=device)
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """On the stream."""
        _copy_tensor(self._stream, source, target)

    send = fetch

    def compute(self, work: Callable[[], None]) -> None:
        """Enqueued now."""
        with torch.cuda.stream(self._stream):
            work()

    def wait(self) -> None:
        """For an event behind all of it, sleeping."""
        _record(self._stream).synchronize()

    def close(self) -> None:
        """The stream is torch's, which keeps it."""


class CudaDevice:
    """One CUDA device.

    Args:
        index: As in "cuda:N".
    """

    separate = True

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self.torch_device = torch.device("cuda", index)
        self.disk_throttle: Throttle | None = None
        self._down: torch.cuda.Stream = _cuda.Stream(device=self.torch_device)
        self._up: torch.cuda.Stream = _cuda.Stream(device=self.torch_device)
        self._out: torch.cuda.Stream = _cuda.Stream(device=self.torch_device)
        self._in: torch.cuda.Stream = _cuda.Stream(device=self.torch_device)
        """Of tensors: they wait for what computes, and blocks are not to wait behind them."""
        self._join: torch.cuda.Stream = _cuda.Stream(device=self.torch_device)
        """Runs nothing: events of several compute streams meet here."""
        self._lock = threading.Lock()
        self._released: dict[int, Any] = {}
        """Latest event of each compute stream that may not have passed yet, by the stream's handle."""

    def host_arena(self, nbytes: int, *, tier: str = "host") -> HostArena:
        """Page-locked host memory."""
        return _RegisteredArena(nbytes, self.torch_device, tier=tier)

    def device_arena(self, nbytes: int) -> AnyArena:
        """Device memory.

        Raises:
            DoesNotFitError: the device has less left, or none in one piece.
        """
        try:
            arena = _DeviceArena(nbytes, self.torch_device)
        except torch.OutOfMemoryError as error:
            available = self.available_nbytes()
            raise DoesNotFitError(
                f"{self.name} has {available} bytes left and cannot give {nbytes} in one piece: free device memory, or "
                f'lower the budget: max_memory={{"device": …}} (--max-memory device=…)',
                tier="device",
                needed_nbytes=nbytes,
                available_nbytes=available,
            ) from error
        owner = torch.cuda.current_stream(self.torch_device)
        for stream in (self._down, self._up):
            stream.wait_stream(owner)
        return arena

    def tensor(self, arena: AnyArena) -> torch.Tensor:
        """The whole arena as one flat uint8 tensor."""
        assert isinstance(arena, _DeviceArena | _RegisteredArena), arena
        assert arena.data is not None, "the arena was closed"
        return arena.data

    def available_nbytes(self) -> int:
        """Free device memory, and what torch's allocator holds without using it."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        idle = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return int(free + idle)

    def copy(self, source: HostArena, start: int, target: AnyArena, offset: int, nbytes: int) -> None:
        """Enqueue host → device."""
        self._enqueue(self._down, source, start, target, offset, nbytes)

    def copy_back(self, source: AnyArena, start: int, target: HostArena, offset: int, nbytes: int) -> None:
        """Enqueue device → host."""
        self._enqueue(self._up, source, start, target, offset, nbytes)

    def _enqueue(
        self, stream: torch.cuda.Stream, source: AnyArena, start: int, target: AnyArena, offset: int, nbytes: int
    ) -> None:
        with torch.cuda.stream(stream):  # makes the device current, too, in whichever thread this is
            destination = self.tensor(target)[offset : offset + nbytes]
            destination.copy_(self.tensor(source)[start : start + nbytes], non_blocking=True)

    def send(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Enqueue device → host of a tensor, once the caller's current stream has come so far."""
        self._up.wait_event(_record(torch.cuda.current_stream(self.torch_device)))
        _copy_tensor(self._up, source, target)
        return _record(self._up)

    def lane(self) -> Lane:
        """A stream."""
        return _Lane(self.torch_device)

    def copy_out(self, source: torch.Tensor, target: HostArena, offset: int, after: Event) -> Event:
        """Enqueue a tensor of the device → host."""
        with torch.cuda.stream(self._out):
            if isinstance(after, torch.cuda.Event):
                self._out.wait_event(after)
            self.tensor(target)[offset : offset + source.nbytes].copy_(source, non_blocking=True)
        return _record(self._out)

    def copy_in(self, source: HostArena, start: int, target: torch.Tensor, after: Event) -> Event:
        """Enqueue host → a tensor of the device."""
        with torch.cuda.stream(self._in):
            if isinstance(after, torch.cuda.Event):
                self._in.wait_event(after)
            target.copy_(self.tensor(source)[start : start + target.nbytes], non_blocking=True)
        return _record(self._in)

    def copies_wait(self, event: Event) -> None:
        """Make later copies wait for an event."""
        if isinstance(event, torch.cuda.Event):
            self._down.wait_event(event)

    def copied(self) -> Event:
        """An event on the copy stream."""
        return _record(self._down)

    def copied_back(self) -> Event:
        """An event on the device → host stream."""
        return _record(self._up)

    def computed(self) -> Event:
        """An event after everything on the caller's current stream, and after earlier leases on other streams."""
        stream = torch.cuda.current_stream(self.torch_device)
        event = _record(stream)
        with self._lock:
            if self._released.keys() != {stream.cuda_stream}:
                self._released = {handle: other for handle, other in self._released.items() if not other.query()}
            self._released[stream.cuda_stream] = event
            if len(self._released) == 1:
                return event
            for other in self._released.values():
                self._join.wait_event(other)
            return _record(self._join)

    def compute_waits(self, event: Event) -> None:
        """Make the caller's current stream wait for an event."""
        if isinstance(event, torch.cuda.Event):
            torch.cuda.current_stream(self.torch_device).wait_event(event)

    def wait(self, event: Event) -> None:
        """Wait on the host, sleeping (the event is a blocking one)."""
        if isinstance(event, torch.cuda.Event):
            event.synchronize()

    def passed(self, event: Event) -> bool:
        """Whether an event has completed."""
        return not isinstance(event, torch.cuda.Event) or bool(event.query())  # type: ignore[no-untyped-call]

    def poison(self, arena: AnyArena, offset: int, nbytes: int) -> None:
        """Fill a range with NaN, on the copy stream so that it precedes later copies."""
        slot = Slot(arena=arena, offset=offset, nbytes=nbytes)
        if isinstance(arena, _DeviceArena):
            with torch.cuda.stream(self._down):
                arena.poison(slot)
        else:
            arena.poison(slot)

    def close(self) -> None:
        """Wait until nothing on the device uses an arena any more: neither a copy nor a kernel of any stream."""
        with self._lock:
            self._released.clear()
        try:
            torch.cuda.synchronize(self.torch_device)
        except RuntimeError as error:  # a kernel failed before: nothing runs any more, and the rest must be freed
            logger.error("%s reported an earlier failure while the model was being closed: %s", self.name, error)


def _copy_tensor(stream: torch.cuda.Stream, source: torch.Tensor, target: torch.Tensor) -> None:
    assert source.dtype == target.dtype  # another dtype, or strides, would be converted, and waited for
    assert source.shape == target.shape
    assert source.is_contiguous()
    assert target.is_contiguous()
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(stream):
        target.copy_(source.detach(), non_blocking=True)


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event: torch.cuda.Event = _cuda.Event(blocking=True)
    event.record(stream)
    return event
