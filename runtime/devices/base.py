"""The device protocol: arenas, one copy stream each way, events. All code above it is the same on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ...memory.arena import AnyArena, HostArena
from ...memory.throttle import Throttle
from ...scheduler.mover import Event


class Lane(Protocol):
    """Operations that follow each other, beside all else that a device does. Used by one thread.

    What copies read and write lies in arenas of the device, on either side, and is left alone until `wait` has
    returned. Tensors that are copied are contiguous, of one dtype and shape.
    """

    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Enqueue host → device."""
        ...

    def compute(self, work: Callable[[], None]) -> None:
        """Enqueue torch operations on the device's memory; `work` may be called now, or by another thread."""
        ...

    def send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Enqueue device → host."""
        ...

    def wait(self) -> None:
        """Wait on the host until all of it has been carried out.

        Raises:
            Exception: what `work` met.
        """
        ...

    def close(self) -> None:
        """End it."""
        ...


class Device(Protocol):
    """A processor and the memory it computes from."""

    name: str
    """As the user writes it: "cpu", "cuda:0", "emulated"."""
    torch_device: torch.device
    separate: bool
    """Whether device memory is a tier of its own."""
    disk_throttle: Throttle | None
    """Rate limit of an emulated disk."""

    def host_arena(self, nbytes: int, *, tier: str = "host") -> HostArena:
        """Host memory that this device copies from and to at full speed. `tier`: its name in errors."""
        ...

    def device_arena(self, nbytes: int) -> AnyArena:
        """Device memory. Only where `separate`."""
        ...

    def tensor(self, arena: AnyArena) -> torch.Tensor:
        """The whole arena as one flat uint8 tensor, made once."""
        ...

    def available_nbytes(self) -> int | None:
        """Device memory that can still be taken; None where the host's counts."""
        ...

    def copy(self, source: HostArena, start: int, target: AnyArena, offset: int, nbytes: int) -> None:
        """Enqueue host → device on the copy stream."""
        ...

    def copy_back(self, source: AnyArena, start: int, target: HostArena, offset: int, nbytes: int) -> None:
        """Enqueue device → host on the stream of that direction."""
        ...

    def send(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Enqueue device → host of a tensor, behind what the caller's compute stream holds now.

        Both are contiguous, of one dtype; the target lies in a host arena of this device. The source's memory must not
        go back to the allocator before the event that is returned has passed, or `compute_waits` has been called for it
        on the stream that it was allocated on.
        """
        ...

    def lane(self) -> Lane:
        """One more lane. It comes after what the caller's compute stream holds now."""
        ...

    def copy_out(self, source: torch.Tensor, target: HostArena, offset: int, after: Event) -> Event:
        """Enqueue a flat uint8 tensor of what computes → host, after an event. Blocks never wait behind it.

        Gives the event of the copy, until which who calls it keeps the tensor.
        """
        ...

    def copy_in(self, source: HostArena, start: int, target: torch.Tensor, after: Event) -> Event:
        """Enqueue host → a flat uint8 tensor of what computes, likewise."""
        ...

    def copies_wait(self, event: Event) -> None:
        """Make what is enqueued to the copy stream from now on wait for an event."""
        ...

    def copied(self) -> Event:
        """An event on the copy stream after everything enqueued so far."""
        ...

    def copied_back(self) -> Event:
        """The same for device → host."""
        ...

    def computed(self) -> Event:
        """An event after everything enqueued for computing so far, on any stream; None where that has run already."""
        ...

    def compute_waits(self, event: Event) -> None:
        """Make the caller's compute stream wait for an event."""
        ...

    def wait(self, event: Event) -> None:
        """Wait on the host until an event has completed (called from a helper thread; releases the GIL)."""
        ...

    def passed(self, event: Event) -> bool:
        """Whether an event has completed, without waiting."""
        ...

    def poison(self, arena: AnyArena, offset: int, nbytes: int) -> None:
        """Fill a range with NaN, ordered before later copies."""
        ...

    def close(self) -> None:
        """Stop threads, unregister memory."""
        ...
