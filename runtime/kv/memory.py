"""What one cache holds of each tier: an arena in host memory, and a private folder on disk."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import torch

from ...memory.arena import PAGE, HostArena
from ...memory.capacity import disk_capacity
from ...memory.disk import DiskEngine
from ...memory.errors import ClosedError, DoesNotFitError, UsageError
from ...memory.scratch import Scratch, default_root, process_scratch
from ..devices.base import Device
from ..devices.cpu import CpuDevice
from ..tiers import reserve, unclaimed_host_nbytes
from .devicememory import DeviceMemory

RING_NBYTES: Final = 32 * 2**20
"""Of host memory, where what is read ahead from disk lies until it is attended to: an eighth of a smaller budget."""
RUN_NBYTES: Final = 4 * 2**20
"""About what is read at once. A run is attended to as a whole."""
RUNS: Final = 4
"""Read-ahead has room for so many, at least: one that is attended to while others are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvBudget:
    """Bytes of each tier that a cache may hold."""

    host: int
    disk: int
    device: int = 0

    @classmethod
    def of(cls, host: int | None, disk: int | None, folder: str | None, *, device: int = 0) -> KvBudget:
        """Fill in what is left open: half of what the host can still give, and half of what is free on disk."""
        if host is None:
            host = unclaimed_host_nbytes() // 2
        if disk is None:
            disk = disk_capacity(folder or default_root()).free_nbytes // 2
        return cls(host=host, disk=disk, device=device)

    @property
    def ring_nbytes(self) -> int:
        """Of host memory, for what is read ahead."""
        return min(self.host // 8, RING_NBYTES) // PAGE * PAGE if self.disk else 0


class KvMemory:
    """Host memory in equal shares for each layer, a ring for what is read from disk, the files, and what a device has.

    Args:
        budget: Never exceeded.
        layers: How many keep their keys and values here.
        folder: To put the files' folder in; None for the default one in the user's cache.
        owner: A name for the ledger.
        device: Whose memory the budget names; None where it names none.

    Raises:
        DoesNotFitError: the host, or the device, cannot give so much.
    """

    def __init__(
        self, budget: KvBudget, *, layers: int, folder: str | None, owner: str, device: Device | None = None
    ) -> None:
        with ExitStack() as made:
            self._reservations = reserve(
                owner, device or CpuDevice(), host_nbytes=budget.host, device_nbytes=budget.device
            )
            for reservation in self._reservations:
                made.callback(reservation.release)
            self.budget = budget
            self.arena = HostArena(budget.host) if device is None else device.host_arena(budget.host)
            made.callback(self.arena.close)
            self.device = None if device is None else DeviceMemory(device, budget.device, layers=layers)
            """What lies there, and what crosses to it."""
            made.pop_all()
        self._reservations[0].touched = self._touched_nbytes
        with torch.inference_mode(False):  # else nothing but inference could ever write to it
            self.tensor = torch.frombuffer(self.arena.buffer, dtype=torch.uint8)
        """All of it, one byte per element."""
        self.engine = DiskEngine()
        self.host_share = (budget.host - budget.ring_nbytes) // layers // PAGE * PAGE
        """Bytes of host memory for each layer."""
        self.disk_share = budget.disk // layers // PAGE * PAGE
        self._layers = layers
        self._folder = folder
        self._scratch: Scratch | None = None

    def share(self, number: int) -> tuple[int, int]:
        """Where the share of a layer lies in the arena: start and stop."""
        start = self.budget.ring_nbytes + number * self.host_share
        return start, start + self.host_share

    def spill_path(self, number: int) -> str:
        """The file of a layer. The folder is made with the first one: who never spills needs none.

        Raises:
            ClosedError: the cache was closed.
            DiskError: the folder cannot be made.
        """
        if not self._reservations:
            raise ClosedError("the cache of keys and values was closed; make a new one")
        if self._scratch is None:
            self._scratch = process_scratch().open(self._folder)
        return os.path.join(self._scratch.path, f"layer-{number}.kv")

    def require(self, slot_nbytes: int, rows: int) -> None:
        """See that a layer's share of host memory has a slot for the growing block of each row, and the ring for runs.

        Raises:
            DoesNotFitError: it has not.
            UsageError: blocks are larger than reads can be.
        """
        if self.device is not None:
            self.device.require(slot_nbytes, rows)
        needed = self._layers * slot_nbytes * (rows + 1)
        ring = self.budget.ring_nbytes
        spills = self.disk_share >= slot_nbytes
        if spills and RUNS * slot_nbytes > RING_NBYTES:
            raise UsageError(
                f"blocks of {slot_nbytes} bytes are too large: {RUNS} of them are read at once, into at most "
                f"{RING_NBYTES} bytes; use smaller blocks (block_tokens=…)"
            )
        if spills:
            needed = max(-(-needed * 8 // 7), 8 * RUNS * slot_nbytes)
        if self.host_share >= slot_nbytes * (rows + 1) and (not spills or ring >= RUNS * slot_nbytes):
            return
        reads = f", and an eighth for reads of {RUNS} blocks" if spills else ""
        raise DoesNotFitError(
            f"keys and values of {rows} sequences in {self._layers} layers need {needed} bytes of host memory at least,"
            f" for each layer {rows + 1} blocks of {slot_nbytes} bytes{reads}; {self.budget.host} bytes are allowed. "
            "Raise the budget of the cache (host=…), use smaller blocks (block_tokens=…), or take fewer sequences at "
            "once",
            tier="host",
            needed_nbytes=needed,
            available_nbytes=self.budget.host,
        )

    def _touched_nbytes(self) -> int:
        """Of the host's reservation; an emulated device's memory is in it."""
        there = self.device.arena if self.device is not None else None
        return self.arena.resident_nbytes() + (there.resident_nbytes() if isinstance(there, HostArena) else 0)

    def close(self) -> None:
        """Stop reading and writing, remove the files, give the memory back. More than once does no harm."""
        reservations, self._reservations = self._reservations, []
        if not reservations:
            return
        try:
            self.engine.close()
        finally:
            try:
                if self.device is not None:
                    self.device.close()
            finally:
                self.tensor = torch.empty(0, dtype=torch.uint8)
                self.arena.close()
                for reservation in reservations:
                    reservation.release()
            if self._scratch is not None:
                self._scratch.close()
