"""Who goes on in a simulation: one call at a time, or several that share sweeps and alternate between two processors.

The policy is that of a real run: the turnstile says who has the device and who the CPU, which blocks are shared and
which are let go (`runtime/sweep.py` does the same with threads).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Hashable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Protocol

from .core import Core
from .lease import Lease, Wish
from .mover import Event
from .turnstile import Turnstile

Granted = Callable[[Lease | Wish], Awaitable[Lease]]
"""Waits for a wish."""


class Gate(Protocol):
    """One caller's way to blocks and processors."""

    async def begin(self, root: int) -> None:
        """A root call starts; see `Setting.root_of`."""
        ...

    async def end(self) -> None:
        """It ends."""
        ...

    async def acquire(self, block: int) -> Lease:
        """A lease on a block of the device's."""
        ...

    def release(self, lease: Lease) -> None:
        """Give it back."""
        ...

    def on_cpu(self, block: int) -> bool:
        """Whether the CPU may compute with a block."""
        ...

    def away(self, part: Hashable, blocks: Sequence[int]) -> AbstractAsyncContextManager[None]:
        """While the caller has the CPU."""
        ...

    def inside(self, part: Hashable, blocks: Sequence[int]) -> AbstractAsyncContextManager[None]:
        """While it computes on the device what the CPU computes for others."""
        ...


class Alone:
    """One caller, which has all there is.

    Args:
        computed: An event after all that the device has been asked for.
        lending_s: What the Python of handing over to the CPU takes, and again on the way back.
    """

    def __init__(self, core: Core, granted: Granted, computed: Callable[[], Event], lending_s: float) -> None:
        self._core = core
        self._granted = granted
        self._computed = computed
        self._lending_s = lending_s

    async def begin(self, root: int) -> None:
        """The executor is told."""
        self._core.begin(root)

    async def end(self) -> None:
        """The executor is told."""
        self._core.end(failed=False)

    async def acquire(self, block: int) -> Lease:
        """As the executor grants it."""
        return await self._granted(self._core.acquire_nowait(block))

    def release(self, lease: Lease) -> None:
        """At once."""
        self._core.release(lease, self._computed())

    def on_cpu(self, block: int) -> bool:
        """Whatever can be."""
        return True

    @asynccontextmanager
    async def away(self, part: Hashable, blocks: Sequence[int]) -> AsyncIterator[None]:
        """Nobody else goes on meanwhile."""
        await asyncio.sleep(self._lending_s)
        yield
        await asyncio.sleep(self._lending_s)

    def inside(self, part: Hashable, blocks: Sequence[int]) -> AbstractAsyncContextManager[None]:
        """There are no others."""
        return nullcontext()


class Lanes:
    """All callers of the same sweeps.

    Args:
        members: Their numbers.
        computed: An event after all that the device has been asked for.
        resident: Blocks that stay on the device; each lane leases them for itself.
        part: Blocks that the CPU computes for calls of few rows, while others go on on the device.
        ahead: Blocks that may stay leased for those that are on the CPU.
        switch_s: Seconds until a lane goes on that was given a processor.
        hand_over_s: The same of one that changes processors.
        swept: Told of each sweep's begin and end.
    """

    def __init__(
        self,
        core: Core,
        granted: Granted,
        computed: Callable[[], Event],
        *,
        members: int,
        resident: Collection[int],
        part: Collection[int],
        ahead: int,
        switch_s: float,
        hand_over_s: float,
        swept: Callable[[bool], None],
    ) -> None:
        self._core = core
        self._granted = granted
        self._computed = computed
        self._resident = resident
        self._part = part
        self._switch_s = switch_s
        self._hand_over_s = hand_over_s
        self._swept = swept
        self._turnstile = Turnstile(ahead=ahead)
        self._batons = [asyncio.Semaphore(0) for _ in range(members)]
        self._shared: dict[int, Lease] = {}
        self._accesses = [Counter[int]() for _ in range(members)]
        self._told = Counter[int]()
        self._next = 0
        for member in range(members):
            self._turnstile.join(member)

    def start(self) -> None:
        """Give the device to the first lane."""
        first = self._turnstile.start()
        if first is not None:
            self._batons[first].release()

    def member(self, number: int) -> Lane:
        """One lane's gate."""
        return Lane(self, number)

    async def join(self, member: int) -> None:
        """Wait for the device for the first time."""
        await self._batons[member].acquire()

    def leave(self, member: int) -> None:
        """A lane takes part no longer."""
        self._turnstile.leave(member)
        self._hand_on(member)

    async def begin(self, member: int, root: int) -> None:
        """Wait for the next sweep, whose calls are all of one root."""
        self._next = root if self._part else 0  # where the CPU computes nothing, no call uses fewer blocks
        self._turnstile.arrive(member, 0)
        await self._pass_on(member)

    def end(self, member: int) -> None:
        """A lane's call ended; it keeps the device."""
        self._turnstile.finish(member)

    async def acquire(self, member: int, block: int) -> Lease:
        """The shared lease, where the block is streamed; others may run before."""
        self._accesses[member][block] += 1
        if block in self._resident:
            return await self._granted(self._core.acquire_nowait(block, observed=self._is_new(member, block)))
        if not self._turnstile.wants(member, block):
            await self._pass_on(member)
        new = self._is_new(member, block)
        lease = self._shared.get(block)
        if lease is None:
            lease = await self._granted(self._core.acquire_nowait(block, observed=new))
            self._shared[block] = lease
            self._turnstile.shares(block)
        self._turnstile.uses(member, block)
        return lease

    def release(self, member: int, lease: Lease) -> None:
        """A shared lease is kept until all have used it."""
        if self._shared.get(lease.block) is lease:
            self._turnstile.used(member, lease.block)
        else:
            self._core.release(lease, self._computed())

    def on_cpu(self, block: int) -> bool:
        """Whether it is the CPU's in these sweeps."""
        return block in self._part

    @asynccontextmanager
    async def away(self, member: int, part: Hashable, blocks: Sequence[int]) -> AsyncIterator[None]:
        """The lane gives the device up, and has it again at the end."""
        self._turnstile.crosses(member, part, last_block=max(blocks))
        await self._pass_on(member, self._hand_over_s)
        yield
        self._turnstile.crossed(member)
        await self._pass_on(member, self._hand_over_s)

    @asynccontextmanager
    async def inside(self, member: int, part: Hashable, blocks: Sequence[int]) -> AsyncIterator[None]:
        """Entered when the CPU is elsewhere."""
        if not self._turnstile.enters(member, part, first_block=min(blocks)):
            await self._pass_on(member)
        yield
        self._turnstile.left(part)
        self._hand_on(None)

    def _is_new(self, member: int, block: int) -> bool:
        """Whether no other lane has used the block so often in this sweep: it belongs to the order, once."""
        if self._accesses[member][block] <= self._told[block]:
            return False
        self._told[block] += 1
        return True

    async def _pass_on(self, member: int, seconds: float | None = None) -> None:
        """Let others run, if it is their turn, and come back with a processor, which is no use for some seconds."""
        if not self._hand_on(member):
            await self._batons[member].acquire()
            await asyncio.sleep(self._switch_s if seconds is None else seconds)

    def _hand_on(self, member: int | None) -> bool:
        """Let those go on whose turn it is; whether `member` is one of them."""
        turn = self._turnstile.turn(member)
        for block in turn.release:
            self._core.release(self._shared.pop(block), self._computed())
        if turn.ends:
            self._core.end(failed=False)
            self._swept(False)
        if turn.begins:
            self._told.clear()
            for accesses in self._accesses:
                accesses.clear()
            self._core.begin(self._next)
            self._swept(True)
        for each in (turn.member, turn.cpu):
            if each is not None and each != member:
                self._batons[each].release()
        return member is not None and member in (turn.member, turn.cpu)


class Lane:
    """One lane's gate: what `Lanes` does, for one of them."""

    def __init__(self, lanes: Lanes, number: int) -> None:
        self._lanes = lanes
        self._number = number

    async def begin(self, root: int) -> None:
        """See `Lanes`; so all of these."""
        await self._lanes.begin(self._number, root)

    async def end(self) -> None:
        """It keeps the device."""
        self._lanes.end(self._number)

    async def acquire(self, block: int) -> Lease:
        """The shared lease."""
        return await self._lanes.acquire(self._number, block)

    def release(self, lease: Lease) -> None:
        """Kept until all have used it."""
        self._lanes.release(self._number, lease)

    def on_cpu(self, block: int) -> bool:
        """Whether it is the CPU's."""
        return self._lanes.on_cpu(block)

    def away(self, part: Hashable, blocks: Sequence[int]) -> AbstractAsyncContextManager[None]:
        """While it has the CPU."""
        return self._lanes.away(self._number, part, blocks)

    def inside(self, part: Hashable, blocks: Sequence[int]) -> AbstractAsyncContextManager[None]:
        """While it computes on the device what is the CPU's."""
        return self._lanes.inside(self._number, part, blocks)
