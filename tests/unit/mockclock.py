"""An asyncio loop whose clock stands still while anything can run, and jumps to the next timer when nothing can.

Tests of schedules take no time, see exact times, and a deadlock is an error at the instant it happens. Times are whole
numbers of ticks, which floats hold exactly.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from penstock.memory.arena import PAGE, AnyArena, Slot
from penstock.scheduler.core import Core
from penstock.scheduler.lease import Lease
from penstock.scheduler.order import AccessOrders
from penstock.scheduler.residence import Tier
from penstock.scheduler.timeline import Timeline


class NothingCanRunError(Exception):
    """Nothing is scheduled and nothing will ever be: the coroutines wait for each other."""


class _JumpingSelector(selectors.SelectSelector):
    loop: MockClockLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)  # the loop wakes itself through a socket
        if events or timeout == 0:
            return events
        if timeout is None:
            raise NothingCanRunError(f"at tick {self.loop.time():.0f}")
        self.loop.now += timeout
        return []


class MockClockLoop(asyncio.SelectorEventLoop):
    """The loop. `time()` is in ticks since it was made."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def ticks(self) -> int:
        return round(self.now)


def run(loop: MockClockLoop, work: Coroutine[Any, Any, Any], *, limit: int = 10**7) -> Any:
    """Run to the end, whatever happens; cancel what is left and close the loop."""
    try:
        return loop.run_until_complete(asyncio.wait_for(work, limit))
    finally:
        loop.run_until_complete(_cancel_all())
        loop.close()


async def _cancel_all() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


@dataclass(frozen=True, eq=False)
class At:
    """An event that completes at a tick."""

    tick: int


class InjectedError(Exception):
    """What a fake drive fails with."""


@dataclass(eq=False)
class FakeMover:
    """Reads one block after another, urgent ones first; copies on one stream; knows what every slot holds and when.

    It fails a test that refills what is still being read.
    """

    loop: MockClockLoop
    read_ticks: dict[int, int]
    copy_ticks: dict[int, int]
    chunks: int = 1
    failures: dict[int, list[bool]] = field(default_factory=dict)
    """For each block, whether its next reads fail."""
    log: list[tuple[int, str, int]] = field(default_factory=list)
    contents: dict[int, int] = field(default_factory=dict)
    busy_until: dict[int, int] = field(default_factory=dict)
    stream_free: int = 0
    moved: int = 0
    _disk_busy: bool = False
    _queue: list[tuple[bool, int, asyncio.Future[None]]] = field(default_factory=list)
    _number: int = 0

    async def read(self, block: int, slot: Slot, *, urgent: bool, on_data: Any) -> None:
        await self._take_disk(urgent)
        try:
            self.log.append((self.loop.ticks(), "read", block))
            assert self.busy_until.get(id(slot), 0) <= self.loop.ticks(), f"slot refilled with {block} while in use"
            fails = self.failures.get(block)
            failing = bool(fails and fails.pop(0))
            self.contents[id(slot)] = -1
            for chunk in range(self.chunks):
                before, after = (self.read_ticks[block] * (chunk + i) // self.chunks for i in (0, 1))
                if after > before:
                    await asyncio.sleep(after - before)
                if failing and chunk == self.chunks // 2:
                    raise InjectedError(f"block {block}")
                on_data(slot.nbytes * chunk // self.chunks, slot.nbytes * (chunk + 1) // self.chunks)
                self.moved += 1
            self.contents[id(slot)] = block
        finally:
            self._give_disk()

    async def _take_disk(self, urgent: bool) -> None:
        if not self._disk_busy:
            self._disk_busy = True
            return
        turn = self.loop.create_future()
        self._number += 1
        heapq.heappush(self._queue, (not urgent, self._number, turn))
        await turn

    def _give_disk(self) -> None:
        while self._queue:
            *_, turn = heapq.heappop(self._queue)
            if not turn.done():
                turn.set_result(None)
                return
        self._disk_busy = False

    def before_copy(self, target: Slot) -> None:
        if isinstance(target.guard, At):
            self.stream_free = max(self.stream_free, target.guard.tick)
            target.guard = None

    def copy(self, block: int, source: Slot, target: Slot, start: int, stop: int) -> None:
        begin = max(self.stream_free, self.loop.ticks())
        assert self.busy_until.get(id(target), 0) <= begin, f"slot overwritten with {block} while in use"
        if not start:
            self.log.append((begin, "copy", block))
        self.stream_free = begin + self.copy_ticks[block] * (stop - start) // source.nbytes
        self.busy_until[id(source)] = self.stream_free
        self.contents[id(target)] = block if stop == source.nbytes else -1
        self.moved += 1

    def copied(self) -> At:
        return At(max(self.stream_free, self.loop.ticks()))

    async def wait(self, event: object) -> None:
        if isinstance(event, At) and event.tick > self.loop.ticks():
            await asyncio.sleep(event.tick - self.loop.ticks())

    def poison(self, slot: Slot) -> None:
        self.contents[id(slot)] = -1

    def progress(self) -> int:
        return self.moved


@dataclass(eq=False)
class Rig:
    """A core on a mock clock, and the consumer's moves."""

    loop: MockClockLoop
    core: Core
    mover: FakeMover
    orders: AccessOrders
    waits: list[tuple[int, int]] = field(default_factory=list)
    """Of each acquire: block, ticks waited until the consumer could compute."""

    async def acquire(self, block: int, *, observed: bool = True) -> Lease:
        start = self.loop.ticks()
        got = self.core.acquire_nowait(block, observed=observed)
        lease = got if isinstance(got, Lease) else await asyncio.wrap_future(got.granted)
        await self.mover.wait(lease.residence.event)
        lease.residence.slot.check_stamp(block)
        self.check(lease)
        self.waits.append((block, self.loop.ticks() - start))
        return lease

    def check(self, lease: Lease) -> None:
        assert self.mover.contents[id(lease.residence.slot)] == lease.block, "another block's bytes under a lease"

    def release(self, lease: Lease, *, tail: int = 0) -> None:
        """Give back; the processor still reads for `tail` ticks."""
        self.check(lease)
        event = None
        if tail:
            busy = max(self.loop.ticks() + tail, self.mover.busy_until.get(id(lease.residence.slot), 0))
            event = At(busy)  # an event covers what was enqueued before it, as on a real device
            self.mover.busy_until[id(lease.residence.slot)] = busy
        self.core.release(lease, event)

    async def use(self, block: int, ticks: int, *, tail: int = 0) -> None:
        lease = await self.acquire(block)
        await asyncio.sleep(ticks)
        self.release(lease, tail=tail)

    async def call(self, blocks: Any, ticks: int, *, root: object = "root", tail: int = 0) -> None:
        """A root call that uses blocks one after another."""
        self.core.begin(root)
        failed = True
        try:
            for block in blocks:
                await self.use(block, ticks, tail=tail)
            failed = False
        finally:
            self.core.end(failed=failed)

    def logged(self, kind: str) -> list[tuple[int, int]]:
        return [(tick, block) for tick, what, block in self.mover.log if what == kind]


def make_rig(
    *,
    blocks: int,
    ring: int,
    permanent: tuple[int, ...] = (),
    back_ring: int | None = None,
    back_permanent: tuple[int, ...] = (),
    read_ticks: int | dict[int, int] = 10,
    copy_ticks: int | dict[int, int] = 4,
    chunks: int = 1,
    failures: dict[int, list[bool]] | None = None,
    order: tuple[int, ...] | None = None,
    inflight: int = 1 << 40,
    droppable: tuple[int, ...] = (),
    on_cpu: tuple[int, ...] = (),
    unordered: int = 0,
) -> Rig:
    """A core with slots of one page; two tiers where `back_ring` is given. The disk and the copy stream are serial."""
    loop = MockClockLoop()

    def tier(name: str, kept: tuple[int, ...], slots: int) -> Tier:
        arena = AnyArena(tier=name, nbytes=PAGE * (len(kept) + slots))
        cut = {block: arena.cut(PAGE) for block in kept}
        return Tier(
            name=name,
            permanent=cut,
            ring=[arena.cut(PAGE) for _ in range(slots)],
            sizes=dict.fromkeys(range(blocks), PAGE),
            droppable=frozenset(droppable),
        )

    def each(ticks: int | dict[int, int]) -> dict[int, int]:
        return ticks if isinstance(ticks, dict) else dict.fromkeys(range(blocks), ticks)

    mover = FakeMover(loop, each(read_ticks), each(copy_ticks), chunks=chunks, failures=failures or {})
    expected = tuple(range(blocks)) if order is None else order
    orders = AccessOrders(lambda root: expected, first="root")
    core = Core(
        front=tier("device", permanent, ring),
        back=None if back_ring is None else tier("host", back_permanent, back_ring),
        nbytes=dict.fromkeys(range(blocks), PAGE),
        mover=mover,
        orders=orders,
        clock=loop.ticks,
        timeline=Timeline(),
        inflight_nbytes=inflight,
        poison=True,
        unordered=unordered,
        on_cpu=on_cpu,
    )
    core.attach(loop)
    return Rig(loop, core, mover, orders)
