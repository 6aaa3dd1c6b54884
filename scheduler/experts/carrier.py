"""Who brings experts into slots that a pool has given them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ...memory.arena import Slot
from ..lease import Lease
from ..mover import Event as DeviceEvent


class Carrier(Protocol):
    """Brings blocks: an executor."""

    def bring(
        self,
        places: Sequence[tuple[int, Slot]],
        gone: Sequence[int] = (),
        *,
        kept: Sequence[tuple[int, Slot]] = (),
        urgent: bool = True,
    ) -> list[int]:
        """See `Core.bring`."""
        ...

    def acquire(self, block: int, *, observed: bool, counted: bool = True) -> Lease:
        """A lease of a block that was brought, waiting for it."""
        ...

    def acquire_host(self, block: int) -> Lease:
        """A lease of the host's copy, beside a device apart."""
        ...

    def release(self, lease: Lease, event: DeviceEvent) -> None:
        """Give it back; its slot may be refilled after the event."""
        ...
