"""The executor's decisions and bookkeeping, inside one asyncio loop. No threads, no torch, no clock of its own.

The path of a block: `_pump` decides (demands first, then prefetches as far as slots and the in-flight limit allow),
`_read` fills a host slot, `_copy` takes it to the device part by part as parts arrive. On a machine whose device and
host are one tier, `_read` alone fills the slot that the consumer leases.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Hashable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from ..memory.arena import Slot
from ..memory.errors import ClosedError, PenstockError
from .adapting import Adapting
from .choice import Choice
from .guests import Guests
from .lease import Lease, Wish
from .loop import Loop
from .mover import Event, Mover
from .order import AccessOrders
from .residence import Residence, Tier
from .sources import Sources
from .tally import ExecutorStatistics, Tally, who_waits
from .timeline import Kind, Timeline
from .wishes import Wishes
from .withdrawals import Withdrawals

logger = logging.getLogger(__name__)


class Core:
    """State and decisions. What consumers call may be called from any thread, the rest runs in the loop.

    Args:
        front: The tier that consumers lease from.
        back: The host tier that blocks pass through on their way to `front`; None when they are one tier.
        nbytes: Size of each block, for the in-flight limit.
        inflight_nbytes: Prefetches under way are kept below this, so that a demand does not queue behind them.
        clock: Nanoseconds, monotonic.
        on_cpu: Blocks that stay in `back` and are computed there at times. They are brought although no order of the
            device's may ever name them.
        unordered: How many of the blocks, the last ones, come by `bring` only.
    """

    def __init__(
        self,
        *,
        front: Tier,
        back: Tier | None,
        nbytes: dict[int, int],
        mover: Mover,
        orders: AccessOrders,
        clock: Callable[[], int],
        timeline: Timeline,
        inflight_nbytes: int,
        poison: bool = False,
        on_cpu: Iterable[int] = (),
        unordered: int = 0,
    ) -> None:
        self.front, self.back = front, back
        self.lock = threading.Lock()
        self.orders = orders
        self.timeline = timeline
        self._tally = Tally(timeline=timeline, clock=clock, nbytes=nbytes)
        self._wishes = Wishes(self._tally, clock)
        self._withdrawals = Withdrawals(front, back)
        self._away = self._withdrawals.away
        self._guests = Guests(front, back)
        self._adapting = Adapting(front, back, orders, self._tally)
        self._choice = Choice(
            front=front,
            back=back,
            orders=orders,
            nbytes=nbytes,
            inflight_nbytes=inflight_nbytes,
            on_cpu=on_cpu,
            ordered=len(nbytes) - unordered,
            away=self._away,
            wishes=self._wishes,
        )
        self._mover = mover
        self._clock = clock
        self._poison = poison
        self._ordered = len(nbytes) - unordered
        self._loop = Loop(self._pump, self._task_failed)
        self._broken: Exception | None = None
        self._sources = None if back is None else Sources(back, self.lock, self._withdrawals, self._loop)

    # --- called by consumers, from any thread -----------------------------------------------------------------------

    def acquire_nowait(
        self, block: int, *, observed: bool = True, backward: bool = False, counted: bool = True
    ) -> Lease | Wish:
        """A lease if the block is ready; else a wish, granted by the loop.

        Accesses outside the model's own run (`observed=False`) teach the order nothing; those of a `backward` pass do
        behind a root call, and nothing within one. It is `counted` as a use, unless somebody only waits for it.

        Raises:
            PenstockError: it comes by `bring` only, and has been forgotten, or was never brought: it has no slot.
        """
        with self.lock:
            if self._broken is not None:
                raise self._broken
            if block >= self._ordered and block not in self.front.holding:
                raise PenstockError(
                    f"block {block} is asked for and has no slot: it comes only to who brings it into one of theirs"
                )
            # what a prefetch met may be over; if it is not, this demand meets it again
            self._wishes.failed.pop(block, None)
            if backward:
                observed = self.orders.begin_backward()
            predicted = not observed or self.orders.observe(block)
            held = self.front.holding.get(block)
            if held is not None and held.ready and (held.leases or block not in self._away):
                held.leases += 1
                if counted:
                    held.used = True
                    self._tally.on_time += 1
                    self._tally.used(held, self._clock())
                if predicted:
                    return Lease(residence=held)
                result: Lease | Wish = Lease(residence=held)
            else:
                if counted and held is None:
                    self._tally.demanded += 1
                elif counted:
                    self._tally.late += 1
                result = self._wishes.add(block, counted=counted)
            if not predicted:
                self._tally.instant("mismatch" if held is not None else "demand", block)
        self._loop.rouse()
        return result

    def acquire_host_nowait(self, block: int) -> Lease | Wish:
        """The same of the host's copy of a block that stays there."""
        back = self.back
        assert back is not None, "there is one tier: it is the host"
        with self.lock:
            if self._broken is not None:
                raise self._broken
            there = back.holding.get(block)
            assert block in back.permanent or (there is not None and there.guest), (
                f"block {block} only passes through the host"
            )
            self._wishes.failed.pop(block, None)
            self._tally.on_cpu += 1
            held = back.holding.get(block)
            if held is not None and held.ready and (held.leases or block not in self._away):
                held.leases += 1
                held.used = True
                return Lease(residence=held)
            wish = self._wishes.add(block, host=True)
        self._loop.rouse()
        return wish

    def forget(self, wish: Wish) -> None:
        """The consumer that waited was interrupted."""
        with self.lock:
            if self._wishes.forget(wish):
                return
        if wish.granted.done() and wish.granted.exception() is None:
            self.release(wish.granted.result(), None)

    def release(self, lease: Lease, event: Event) -> None:
        """Give a lease back; the slot may be refilled after `event`, which covers all that was enqueued before it."""
        held = lease.residence
        with self.lock:
            held.slot.check_stamp(held.block)
            held.leases -= 1
            assert held.leases >= 0, f"block {held.block} released twice"
            if event is not None:
                held.slot.guard = event
            # a slot of somebody else's is nothing to decide about
            idle = held.leases == 0 and not held.permanent and not held.guest
            self._withdrawals.retire(held.block)
        if idle:
            self._loop.rouse()

    def bring(
        self,
        places: Sequence[tuple[int, Slot]],
        gone: Iterable[int] = (),
        *,
        kept: Sequence[tuple[int, Slot]] = (),
        urgent: bool = True,
    ) -> list[int]:
        """Bring blocks into slots of the caller's own, ahead of what is prefetched, and forget others that lie in such.

        For blocks that no order foretells (experts). They are leased like all others, without being observed, and stay
        until the caller has them forgotten. One that could not be brought raises for who asks for it, and is gone then.

        Args:
            places: Blocks, each with its slot, in the order in which they are wanted. A slot may be that of a block in
                `gone`.
            gone: Blocks that nobody leases and nothing brings; those that are not there any more are passed over.
            kept: Beside a device apart, blocks to be read into slots in host memory, where they stay until `let_go`.
                What passes through the host just now cannot be.
            urgent: Whether `places` are waited for; else they are read behind what is.

        Returns:
            Those of `kept` that are kept.

        Raises:
            PenstockError: the executor was closed.
        """
        with self.lock:
            if self._broken is not None:
                raise self._broken
            self._guests.forget(gone)
            taken = self._guests.keep(kept)
            self._guests.take_in(places, urgent=urgent)
        if places or taken:
            self._loop.rouse()
        return taken

    def let_go(self, blocks: Iterable[int]) -> list[int]:
        """Forget host copies that `bring` was to keep, as far as nobody uses them and nothing moves them.

        Returns:
            Those whose slots are free now; the others are to be asked for again later.
        """
        with self.lock:
            return self._guests.let_go(blocks)

    def withdraw(self, block: int) -> Future[None]:
        """Let nobody have a block until `readmit`: its bytes are about to change.

        Done once no lease is left, nothing moves it, and every copy of it has been dropped except the one to be
        changed: the one that stays in host memory, where the block stays there. Whoever asks meanwhile waits, except
        for a block that is still leased: who holds it may need it twice.
        """
        with self.lock:
            return self._withdrawals.begin(block)

    def leaving(self, block: int) -> Future[None]:
        """What `withdraw` gave for a block."""
        with self.lock:
            return self._away[block]

    def readmit(self, block: int) -> None:
        """Its bytes are what they are to be, in host memory if it stays there, and on disk."""
        with self.lock:
            self._withdrawals.end(block)
        self._loop.rouse()

    def begin(self, root: Hashable) -> None:
        """A root call starts."""
        with self.lock:
            if self.orders.in_backward:
                self._learn()
            self.orders.begin(root)
        self._loop.rouse()

    def end(self, *, failed: bool) -> None:
        """A root call returned, or raised."""
        with self.lock:
            if failed:
                self.orders.abort()
            else:
                self._learn()
        self._loop.rouse()

    def _learn(self) -> None:
        """A root call is over, or a backward pass."""
        if self.orders.end():
            self._tally.instant("relearn", -1)
        self._adapting.call_ended()

    # --- in the loop ------------------------------------------------------------------------------------------------

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run in this loop, which is the calling thread's, from now on."""
        self._loop.attach(loop)

    async def stop(self, reason: Exception) -> None:
        """Cancel everything under way and tell every waiter why."""
        self.fail(reason)
        await self._loop.cancel()

    def fail(self, reason: Exception) -> None:
        """Give nothing out any more; tell every waiter why."""
        with self.lock:
            self._broken = self._broken or reason
            wishes, self._wishes.waiting = self._wishes.waiting, []
            self._withdrawals.fail(reason)
        for wish in wishes:
            wish.granted.set_exception(reason)

    def _pump(self) -> None:
        if self._broken is not None:
            return
        starts: list[Callable[[], Coroutine[Any, Any, None]]] = []
        with self.lock:
            now = self._clock()
            for held in (*self._guests.for_front(), *self._choice.for_front()):
                held.issued_ns = now
                starts.append(lambda held=held: self._copy(held) if self.back else self._read(self.front, held))  # type: ignore[misc]
            if self.back is not None and self._sources is not None:
                fed = [*self._guests.for_back(), *self._choice.for_back()]
                for held in fed:
                    held.issued_ns = now
                    starts.append(lambda held=held: self._read(self.back, held))  # type: ignore[misc]
                if fed:
                    self._sources.placed()
        for start in starts:
            self._loop.spawn(start())

    def _task_failed(self, failure: BaseException) -> None:
        """A bug of ours: nobody may wait for ever."""
        logger.error("the executor failed", exc_info=failure)
        error = ClosedError(f"the executor stopped after an internal error: {failure!r}")
        error.__cause__ = failure
        self.fail(error)

    async def _read(self, tier: Tier, held: Residence) -> None:
        """Fill a host slot from disk."""
        start = self._clock()
        error: Exception | None = None
        try:
            if held.slot.guard is not None:
                await self._mover.wait(held.slot.guard)
                held.slot.guard = None
            if self._poison:
                self._mover.poison(held.slot)
            await self._mover.read(held.block, held.slot, urgent=held.urgent, on_data=held.add_range)
        except Exception as failure:  # any failure must reach the consumer, in its thread
            error = failure
        kind: Kind = "read" if error is None else "error"
        self._tally.span(kind, held.block, start, issued_ns=held.issued_ns, urgent=held.urgent)
        self._settle(tier, held, error)

    async def _copy(self, held: Residence) -> None:
        """Take a block from its host slot to its device slot, part by part as parts arrive."""
        assert self._sources is not None
        error: Exception | None = None
        source: Residence | None = None
        start, started = self._clock(), False
        try:
            source = await self._sources.pin(held.block)
            self._mover.before_copy(held.slot)
            if self._poison:
                self._mover.poison(held.slot)
            async for first, last in source.arriving():
                if not started:
                    start, started = self._clock(), True
                self._mover.copy(held.block, source.slot, held.slot, first, last)
            held.event = self._mover.copied()
        except Exception as failure:  # as above
            error = failure
        self._settle(self.front, held, error)
        if source is None:
            return
        # after a failure too: parts that came before it may still be on their way out of the host slot
        await self._mover.wait(held.event if error is None else self._mover.copied())
        kind: Kind = "copy" if error is None else "error"
        self._tally.span(kind, held.block, start, issued_ns=held.issued_ns, urgent=held.urgent)
        self._sources.unpin(source)

    def _settle(self, tier: Tier, held: Residence, error: Exception | None) -> None:
        """A block has arrived, or will not: tell whoever waits."""
        with self.lock:
            held.slot.stamp = held.block if error is None else -1
            held.ready_ns = self._clock()
            tier.settle(held, error)
            # a read ahead of need fails for the consumer too: nobody would notice, and it would be tried for ever
            unseen = error is not None and not held.pins and held.block not in self.front.holding
            here = tier is self.back
            waiting = [w for w in self._wishes.waiting if w.block == held.block and (unseen or w.host == here)]
            for wish in waiting:
                if error is not None:
                    self._wishes.refuse(wish, error)
                elif held.block not in self._away:
                    self._wishes.grant(wish, held)
            if error is not None and not waiting and (unseen or not here) and not held.guest:
                self._wishes.failed[held.block] = error
            if error is not None and not held.pins and (waiting or not held.guest):  # a guest tells who asks for it
                tier.drop(held.block)
            self._withdrawals.retire(held.block)
        self._loop.rouse()

    # --- telling ----------------------------------------------------------------------------------------------------

    def report(self) -> str:
        """Who waits for what, on one line: the watchdog's text."""
        with self.lock:
            return who_waits(self._wishes.waiting, self.front, self.back)

    def statistics(self) -> ExecutorStatistics:
        """A frozen record of the totals."""
        with self.lock:
            return self._tally.statistics(wasted=self.front.wasted, orders=self.orders.statistics())
