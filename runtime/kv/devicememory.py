"""What one cache holds of a device: blocks of each layer, and a ring for those that cross the link."""

from __future__ import annotations

from typing import Final

import torch

from ...memory.arena import PAGE, HostArena
from ...memory.errors import DoesNotFitError, UsageError
from ...scheduler.mover import Event
from ..devices.base import Device

RING_NBYTES: Final = 64 * 2**20
"""Of device memory, for what crosses the link: an eighth of a smaller budget."""
PIECE_NBYTES: Final = 4 * 2**20
"""About what crosses at once."""
PIECES: Final = 2
"""The ring has room for so many, at least: one is attended to while another one arrives."""


class DeviceMemory:
    """One arena in a device's memory: the ring first, then equal shares for each layer.

    Args:
        device: With memory of its own. It is closed by who opened it.
        nbytes: Never exceeded.
        layers: How many have shares.
    """

    def __init__(self, device: Device, nbytes: int, *, layers: int) -> None:
        if not device.separate:
            raise UsageError(
                f"{device.name} has no memory of its own: leave device= out of the budget of keys and values"
            )
        self.device = device
        self.nbytes = nbytes
        self.ring_nbytes = min(nbytes // 8, RING_NBYTES) // PAGE * PAGE
        self.share_nbytes = (nbytes - self.ring_nbytes) // layers // PAGE * PAGE
        """For each layer."""
        self._layers = layers
        self.arena = device.device_arena(nbytes)
        with torch.inference_mode(False):  # else nothing but inference could ever write to it
            self.tensor = device.tensor(self.arena)
            """All of it, one byte per element."""
        self.sent_nbytes = 0
        """To host memory."""
        self.fetched_nbytes = 0
        """From it, to be attended to."""

    def share(self, number: int) -> tuple[int, int]:
        """Where the share of a layer lies: start and stop."""
        start = self.ring_nbytes + number * self.share_nbytes
        return start, start + self.share_nbytes

    def require(self, slot_nbytes: int, rows: int) -> None:
        """See that a layer's share has a slot for the growing block of each row, and one more; and the ring for pieces.

        Raises:
            DoesNotFitError: it has not.
        """
        if self.share_nbytes >= slot_nbytes * (rows + 1) and self.ring_nbytes >= PIECES * slot_nbytes:
            return
        needed = max(-(-self._layers * slot_nbytes * (rows + 1) * 8 // 7), 8 * PIECES * slot_nbytes)
        raise DoesNotFitError(
            f"keys and values of {rows} sequences in {self._layers} layers need {needed} bytes of device memory at "
            f"least, for each layer {rows + 1} blocks of {slot_nbytes} bytes, and an eighth for {PIECES} blocks that "
            f"cross the link; {self.nbytes} bytes are allowed. Raise the budget of the cache (device=…), or leave it "
            "out, use smaller blocks (block_tokens=…), or take fewer sequences at once",
            tier="device",
            needed_nbytes=needed,
            available_nbytes=self.nbytes,
        )

    def send(self, source: torch.Tensor, target: torch.Tensor) -> Sending:
        """Begin to copy a slot to one in host memory, behind what computes now."""
        self.sent_nbytes += source.nbytes
        return Sending(self.device, self.device.send(source, target))

    def fetch(self, source: HostArena, start: int, offset: int, nbytes: int, *, after: Event) -> Event:
        """Begin to copy host memory into the ring once `after` has passed; the event of its end."""
        self.fetched_nbytes += nbytes
        self.device.copies_wait(after)
        self.device.copy(source, start, self.arena, offset, nbytes)
        return self.device.copied()

    def close(self) -> None:
        """Give the memory back, once nobody uses it any more."""
        self.device.wait(self.device.copied())
        self.device.wait(self.device.copied_back())
        self.device.wait(self.device.computed())
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self.arena.close()


class Sending:
    """A slot on its way to host memory; to be waited for like a write to disk."""

    def __init__(self, device: Device, event: Event) -> None:
        self._device = device
        self._event = event

    def done(self) -> bool:
        """Whether it is there."""
        return self._device.passed(self._event)

    def wait(self) -> bool:
        """Wait on the host until it is."""
        self._device.wait(self._event)
        return True
