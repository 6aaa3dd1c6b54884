"""What one tier holds: slots, and the blocks in them. Plain state, changed only under the executor's lock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Set
from dataclasses import dataclass, field

from ..memory.arena import Slot


@dataclass(kw_only=True, slots=True, eq=False)
class Residence:
    """A block in a slot, or on its way into it."""

    block: int
    slot: Slot
    permanent: bool
    guest: bool = False
    """Whether somebody else gave it its slot, and decides when it goes."""
    urgent: bool = False
    ready: bool = False
    leases: int = 0
    pins: int = 0
    """Copies that still read the slot."""
    event: object = None
    """Event after which the bytes are there for the consumer's stream; None when they are there already."""
    used: bool = False
    """Whether it was leased since it was filled."""
    issued_ns: int = -1
    """When it was decided to bring it."""
    ready_ns: int = -1
    """Since when it is there."""
    ranges: list[tuple[int, int]] = field(default_factory=list)
    """Parts of the slot that have become valid so far, in the order of arrival."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None

    def add_range(self, start: int, stop: int) -> None:
        """A part became valid (called in the loop)."""
        self.ranges.append((start, stop))
        self.changed.set()

    def settle(self, error: Exception | None) -> None:
        """Every part is valid, or never will be (called in the loop)."""
        self.error = error
        self.ready = error is None
        self.changed.set()

    async def arriving(self) -> AsyncIterator[tuple[int, int]]:
        """The valid parts, each as soon as it is there.

        Raises:
            Exception: whatever stopped the block from arriving.
        """
        if self.ready:  # one large copy is cheaper to enqueue than the many it arrived in
            yield 0, self.slot.nbytes
            return
        at = 0
        while True:
            while at < len(self.ranges):
                yield self.ranges[at]
                at += 1
            if self.error is not None:
                raise self.error
            if self.ready:
                return
            self.changed.clear()
            await self.changed.wait()


class Tier:
    """The slots of one tier.

    Args:
        permanent: Slots of the blocks that stay, by block.
        ring: Slots that the others pass through.
        sizes: Bytes that each block needs here.
        droppable: Blocks that need not stay: disk has them too, and nobody reads them without a lease.
    """

    def __init__(
        self,
        *,
        name: str,
        permanent: Mapping[int, Slot],
        ring: Iterable[Slot],
        sizes: Mapping[int, int],
        droppable: Set[int] = frozenset(),
    ) -> None:
        self.name = name
        self.sizes = sizes
        self._droppable = droppable
        self.permanent = dict(permanent)
        self.free = list(ring)
        self.ring_slots = len(self.free)
        self.ring_nbytes = min((slot.nbytes for slot in self.free), default=0)
        """Bytes of the smallest slot of the ring."""
        self.holding: dict[int, Residence] = {}
        self.arriving: dict[int, Residence] = {}
        """Those held that are not ready yet, in the order in which they were placed."""
        self._ring: dict[int, Residence] = {}
        """Those held that take a ring slot."""
        self.unloaded = set(self.permanent)
        """Permanent blocks that have not been brought yet."""
        self.wasted = 0
        """Blocks dropped without having been used."""

    def in_ring(self) -> Set[int]:
        """Blocks that take a ring slot."""
        return self._ring.keys()

    def evictable(self) -> set[int]:
        """Blocks whose ring slot may be taken now."""
        return {block for block, held in self._ring.items() if held.ready and not held.leases and not held.pins}

    def place(self, block: int, *, urgent: bool, victim: int | None = None) -> Residence:
        """Give `block` its own slot, or a free one, or that of `victim`."""
        assert block not in self.holding, f"block {block} is in {self.name} already"
        slot = self.permanent.get(block)
        if slot is None:
            if victim is not None:
                self.drop(victim)
            slot = self.free.pop(0)
        self.unloaded.discard(block)
        slot.stamp = -1
        held = Residence(block=block, slot=slot, permanent=block in self.permanent, urgent=urgent)
        self.holding[block] = self.arriving[block] = held
        if not held.permanent:
            self._ring[block] = held
        return held

    def take_in(self, block: int, slot: Slot, *, urgent: bool = True) -> Residence:
        """Give `block` a slot of somebody else's, who also decides when it goes."""
        assert block not in self.holding, f"block {block} is in {self.name} already"
        slot.stamp = -1
        held = Residence(block=block, slot=slot, permanent=False, guest=True, urgent=urgent)
        self.holding[block] = self.arriving[block] = held
        return held

    def settle(self, held: Residence, error: Exception | None) -> None:
        """A block of this tier has arrived, or will not."""
        if self.arriving.get(held.block) is held:
            del self.arriving[held.block]
        held.settle(error)

    def preload(self, block: int) -> Slot:
        """The slot of a permanent block whose bytes are put there before the executor starts."""
        held = self.place(block, urgent=False)
        self.arriving.pop(block)
        held.ready = True
        held.slot.stamp = block
        held.ranges.append((0, held.slot.nbytes))
        return held.slot

    def drop(self, block: int) -> None:
        """Forget a block and free its slot."""
        held = self.holding[block]
        assert not held.leases, f"block {block} dropped from {self.name} while leased"
        assert not held.pins, f"block {block} dropped from {self.name} while it is being copied"
        assert block not in self.arriving, f"block {block} dropped from {self.name} while it is being filled"
        del self.holding[block]
        held.slot.stamp = -1
        self.wasted += held.ready and not held.used
        if not held.permanent and not held.guest:
            del self._ring[block]
            self.free.append(held.slot)
        if block in self.permanent:
            self.unloaded.add(block)

    def movable(self) -> set[int]:
        """Blocks that stay and could as well pass through the ring, from this moment on."""
        return {
            block
            for block in self._droppable & self.permanent.keys()
            if self.sizes[block] <= self.ring_nbytes
            and ((held := self.holding.get(block)) is None or (held.ready and not held.leases and not held.pins))
        }

    def exchange(self, leaves: int, comes: int) -> None:
        """Give the slot of a movable block to another one, which stays from then on, and is not there yet."""
        slot = self.permanent[leaves]
        assert self.sizes[comes] <= slot.nbytes, f"block {comes} does not fit the slot of {leaves} in {self.name}"
        if leaves in self.holding:
            self.drop(leaves)
        del self.permanent[leaves]
        self.unloaded.discard(leaves)
        self.permanent[comes] = slot
        if comes not in self.holding:  # else when it leaves the ring
            self.unloaded.add(comes)
