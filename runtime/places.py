"""Memory for a layout's blocks: an arena per tier, and a slot in it for each block that stays, and for the rings."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import ExitStack

from ..memory.arena import AnyArena, HostArena
from ..scheduler.residence import Residence, Tier
from .backing import Backing, ModuleBacking
from .devices.base import Device
from .layout import Layout


class Places:
    """Arenas and tiers of one model.

    Args:
        on_cpu: Blocks that stay in host memory and are computed there at times.
        droppable: Blocks that need not stay where the layout has them.
        made: Closes the arenas, unless it is told otherwise.
    """

    def __init__(
        self, device: Device, layout: Layout, *, on_cpu: Set[int], droppable: frozenset[int], made: ExitStack
    ) -> None:
        self.host, self.front_arena = _arenas(device, layout, made)
        """Host memory, and the arena that modules compute from: the same where there is one tier."""
        self.front, self.back = self._tiers(layout, droppable, on_cpu)
        """The tier that modules compute from, and the host's below it, where they are two."""

    def _tiers(self, layout: Layout, droppable: frozenset[int], on_cpu: Set[int]) -> tuple[Tier, Tier | None]:
        front, host = self.front_arena, self.host
        first = Tier(
            name="device" if layout.back else "host",
            permanent={b.id: front.cut(b.front_nbytes) for b in layout.blocks if b.id in layout.front.resident},
            ring=[front.cut(layout.front.slot_nbytes) for _ in range(layout.front.slots)],
            sizes={b.id: b.front_nbytes for b in layout.blocks},
            droppable=droppable,
        )
        if layout.back is None:
            return first, None
        second = Tier(
            name="host",
            permanent={b.id: host.cut(b.image.nbytes) for b in layout.blocks if b.id in layout.back.resident},
            ring=[host.cut(layout.back.slot_nbytes) for _ in range(layout.back.slots)],
            sizes={b.id: b.image.nbytes for b in layout.blocks},
            droppable=droppable - on_cpu,  # they are idle only for the device
        )
        return first, second

    def staying(self, block: int) -> Iterator[tuple[AnyArena, Residence]]:
        """Where a block is now and stays, that of the tier that computes first."""
        for tier, arena in ((self.front, self.front_arena), (self.back, self.host)):
            held = None if tier is None else tier.holding.get(block)
            if held is not None and held.permanent and held.ready:
                yield arena, held


def _arenas(device: Device, layout: Layout, made: ExitStack) -> tuple[HostArena, AnyArena]:
    host = device.host_arena((layout.back or layout.front).nbytes + layout.expert_host_nbytes)
    made.callback(host.close)
    if layout.back is None:
        return host, host
    front = device.device_arena(layout.front.nbytes + layout.expert_device_nbytes)
    made.callback(front.close)
    return host, front


def droppable(layout: Layout, backing: Backing) -> frozenset[int]:
    """Blocks that need not stay where the plan keeps them, if others turn out to be used more often.

    Not those of a built module, whose only copy is in the arena, nor pieces of tables, whose rows are looked up where
    they stay without a lease, nor experts, which are in no order.
    """
    if isinstance(backing, ModuleBacking):
        return frozenset()
    fixed = {0}.union(*layout.tables.values())
    passes = layout.front.slot_nbytes if layout.back is None else layout.back.slot_nbytes
    return frozenset(
        block.id
        for block in layout.blocks
        if block.id not in fixed and not layout.is_expert(block) and block.image.nbytes <= passes
    )
