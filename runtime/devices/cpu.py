"""The CPU: device and host are one tier, nothing is copied, every event has passed."""

from __future__ import annotations

import ctypes

import torch

from ...memory.arena import AnyArena, HostArena, Slot
from ...memory.throttle import Throttle
from ...scheduler.mover import Event
from .base import Lane


class CpuDevice:
    """Computes where blocks are read to."""

    name = "cpu"
    separate = False

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.disk_throttle: Throttle | None = None

    def host_arena(self, nbytes: int, *, tier: str = "host") -> HostArena:
        """Plain host memory."""
        return HostArena(nbytes, tier=tier)

    def device_arena(self, nbytes: int) -> AnyArena:
        """There is none."""
        raise NotImplementedError("the cpu device has no tier of its own")

    def tensor(self, arena: AnyArena) -> torch.Tensor:
        """The whole arena as one flat uint8 tensor."""
        assert isinstance(arena, HostArena)
        return torch.frombuffer(arena.buffer, dtype=torch.uint8)

    def available_nbytes(self) -> int | None:
        """The host's memory counts."""
        return None

    def copy(self, source: HostArena, start: int, target: AnyArena, offset: int, nbytes: int) -> None:
        """Never asked for: there is no link."""
        raise NotImplementedError("the cpu device has no link")

    def copy_back(self, source: AnyArena, start: int, target: HostArena, offset: int, nbytes: int) -> None:
        """Never asked for either."""
        raise NotImplementedError("the cpu device has no link")

    def send(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Nor is this."""
        raise NotImplementedError("the cpu device has no link")

    def lane(self) -> Lane:
        """Nor are these."""
        raise NotImplementedError("the cpu device has no lanes")

    def copy_out(self, source: torch.Tensor, target: HostArena, offset: int, after: Event) -> Event:
        """Copied when this returns: into a buffer on its way to disk, there is no other use."""
        ctypes.memmove(target.address + offset, source.data_ptr(), source.nbytes)
        return None

    def copy_in(self, source: HostArena, start: int, target: torch.Tensor, after: Event) -> Event:
        """Likewise, on its way back."""
        ctypes.memmove(target.data_ptr(), source.address + start, target.nbytes)
        return None

    def copies_wait(self, event: Event) -> None:
        """No copy stream."""

    def copied(self) -> Event:
        """Nothing is ever under way."""
        return None

    copied_back = copied

    def computed(self) -> Event:
        """CPU kernels have run when their call returns."""
        return None

    def compute_waits(self, event: Event) -> None:
        """Nothing to wait for."""

    def wait(self, event: Event) -> None:
        """Nothing to wait for."""

    def passed(self, event: Event) -> bool:
        """Nothing is ever under way."""
        return True

    def poison(self, arena: AnyArena, offset: int, nbytes: int) -> None:
        """Fill a range with NaN."""
        arena.poison(Slot(arena=arena, offset=offset, nbytes=nbytes))

    def close(self) -> None:
        """Nothing to stop."""
