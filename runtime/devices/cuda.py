"""CUDA: one copy stream each way, events in both directions, one registered host arena.

Ordering, written out. Read after write: a copy records its event on the copy stream; the compute stream waits for that
event before the first kernel that reads the slot (`compute_waits`), and only once the event has been recorded. Write
after read: releasing a lease records an event on the compute stream; the copy stream waits for it before the next copy
into the slot (`copies_wait`); a host slot is refilled from disk only after a host-side wait on the copy that reads it.
"""

from __future__ import annotations

import logging

import torch

from ...memory.arena import POISON, AnyArena, HostArena, Slot
from ...memory.throttle import Throttle
from ...scheduler.mover import Event

logger = logging.getLogger(__name__)


class _DeviceArena(AnyArena):
    """One flat allocation on the device."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        super().__init__(tier="device", nbytes=max(nbytes, 4096))
        self.data: torch.Tensor | None = torch.empty(self.nbytes, dtype=torch.uint8, device=device)

    def poison(self, slot: Slot) -> None:
        assert self.data is not None
        self.data[slot.offset : slot.offset + slot.nbytes].fill_(POISON)

    def close(self) -> None:
        self.data = None


class _RegisteredArena(HostArena):
    """A host arena that CUDA has locked and mapped, exactly as large as asked for."""

    registered = False

    def register(self, device: torch.device) -> None:
        """Lock the pages for DMA. Where that fails the arena still works, at the speed of pageable copies."""
        with torch.cuda.device(device):
            error = int(torch.cuda.cudart().cudaHostRegister(self.address, self.nbytes, 0))
        self.registered = error == 0
        if error:
            logger.warning(
                "cudaHostRegister refused %d bytes of host memory (CUDA error %d): copies will run at pageable speed. "
                "Lower the host budget, or raise the memory limit of the container.",
                self.nbytes,
                error,
            )

    def close(self) -> None:
        if self.registered:
            self.registered = False
            torch.cuda.cudart().cudaHostUnregister(self.address)
        super().close()


class CudaDevice:
    """One CUDA device."""

    separate = True

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self.torch_device = torch.device("cuda", index)
        self.disk_throttle: Throttle | None = None
        self._down = torch.cuda.Stream(device=self.torch_device)
        self._up = torch.cuda.Stream(device=self.torch_device)
        self._tensors: dict[int, torch.Tensor] = {}

    def host_arena(self, nbytes: int) -> HostArena:
        """Page-locked host memory."""
        arena = _RegisteredArena(nbytes)
        arena.register(self.torch_device)
        return arena

    def device_arena(self, nbytes: int) -> AnyArena:
        """Device memory."""
        return _DeviceArena(nbytes, self.torch_device)

    def tensor(self, arena: AnyArena) -> torch.Tensor:
        """The whole arena as one flat uint8 tensor."""
        if isinstance(arena, _DeviceArena):
            assert arena.data is not None
            return arena.data
        assert isinstance(arena, HostArena)
        known = self._tensors.get(id(arena))
        if known is None:
            known = self._tensors[id(arena)] = torch.frombuffer(arena.buffer, dtype=torch.uint8)
        return known

    def available_nbytes(self) -> int | None:
        """Free device memory, and what torch's allocator holds without using it."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        idle = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return int(free + idle)

    def copy(self, source: HostArena, start: int, target: AnyArena, offset: int, nbytes: int) -> None:
        """Enqueue host → device."""
        with torch.cuda.stream(self._down):
            destination = self.tensor(target)[offset : offset + nbytes]
            destination.copy_(self.tensor(source)[start : start + nbytes], non_blocking=True)

    def copy_back(self, source: AnyArena, start: int, target: HostArena, offset: int, nbytes: int) -> None:
        """Enqueue device → host."""
        with torch.cuda.stream(self._up):
            destination = self.tensor(target)[offset : offset + nbytes]
            destination.copy_(self.tensor(source)[start : start + nbytes], non_blocking=True)

    def copies_wait(self, event: Event) -> None:
        """Make later copies wait for an event."""
        if isinstance(event, torch.cuda.Event):
            self._down.wait_event(event)

    def copied(self) -> Event:
        """An event on the copy stream."""
        return self._record(self._down)

    def copied_back(self) -> Event:
        """An event on the device → host stream."""
        return self._record(self._up)

    def computed(self) -> Event:
        """An event on the caller's current stream."""
        return self._record(torch.cuda.current_stream(self.torch_device))

    def _record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event

    def compute_waits(self, event: Event) -> None:
        """Make the caller's current stream wait for an event."""
        if isinstance(event, torch.cuda.Event):
            torch.cuda.current_stream(self.torch_device).wait_event(event)

    def wait(self, event: Event) -> None:
        """Wait on the host, sleeping (the event is a blocking one)."""
        if isinstance(event, torch.cuda.Event):
            event.synchronize()

    def poison(self, arena: AnyArena, offset: int, nbytes: int) -> None:
        """Fill a range with NaN, on the copy stream so that it precedes later copies."""
        slot = Slot(arena=arena, offset=offset, nbytes=nbytes)
        if isinstance(arena, _DeviceArena):
            with torch.cuda.stream(self._down):
                arena.poison(slot)
        else:
            arena.poison(slot)

    def close(self) -> None:
        """Wait for copies that are under way, then let go of the arenas' tensors."""
        self._down.synchronize()
        self._up.synchronize()
        self._tensors.clear()
