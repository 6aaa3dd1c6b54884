"""The executor's hands in a simulation: a drive, a link and a stream that take the time a machine's curves say."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from ..memory.arena import Slot
from ..memory.requests import request_nbytes
from .contention import Contention
from .cost import CostModel
from .mover import Event
from .virtualtime import VirtualLoop

PARTS: Final = 4
"""That a block is simulated in, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """What bringing a block moves."""

    read_nbytes: int
    """From disk, padding included."""
    copied_nbytes: int
    """Over the link to the device; 0 where there is none."""


@dataclass(kw_only=True, eq=False)
class _Copied:
    """A point on the copy stream."""

    passed: asyncio.Future[None]


class SimulatedMover:
    """Reads chunk by chunk, urgent blocks first; copies part by part, on one stream.

    Args:
        moved: By block.
        chunk_nbytes: Size of a request. A large block is simulated in fewer parts, at the same rate.
    """

    def __init__(
        self,
        *,
        loop: VirtualLoop,
        contention: Contention,
        cost: CostModel,
        moved: Mapping[int, Moved],
        chunk_nbytes: int,
    ) -> None:
        self._loop = loop
        self._contention = contention
        self._cost = cost
        self._moved = moved
        self._chunk_nbytes = chunk_nbytes
        self._disk_busy = False
        self._turns: list[tuple[bool, int, asyncio.Future[None]]] = []
        self._number = 0
        self._requests = 0
        """That the drive has been asked for and has not answered: with few of them it is slower."""
        self._tail: asyncio.Future[None] | None = None
        """When the copy stream has done all that was enqueued."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._progress = 0
        self.read_nbytes = self.copied_nbytes = 0

    # --- the drive --------------------------------------------------------------------------------------------------

    async def read(self, block: int, slot: Slot, *, urgent: bool, on_data: Callable[[int, int], None]) -> None:
        """Fill a host slot, a chunk at a time: another block may come between two chunks.

        The executor's Python comes before, to decide and to ask, and after, to tell who waits: about half of it each.
        """
        total, at = self._moved[block].read_nbytes, 0
        serve_s = self._cost.hardware.sharing.serve_s
        await self._contention.work("serve", serve_s / 2)
        if not self._disk_busy:  # else it was asked for while the drive did something else
            await asyncio.sleep(max((drive.latency_s for drive in self._cost.hardware.drives), default=0.0))
        request = max(min(request_nbytes(total, chunk_nbytes=self._chunk_nbytes), total), 1)
        part = max(request, -(-total // PARTS))
        turns = self._queue(-(-total // part), urgent)
        left = -(-total // request)
        self._ask(left)
        try:
            for turn in turns:
                await turn
                nbytes = min(part, total - at)
                await self._contention.work("read", self._cost.read_s(nbytes, request))
                answered = min(-(-nbytes // request), left)
                self._ask(-answered)
                left -= answered
                self._next()
                on_data(slot.nbytes * at // total, slot.nbytes * (at + nbytes) // total)
                at += nbytes
                self.read_nbytes += nbytes
                self._progress += 1
            await self._contention.work("serve", serve_s / 2)
        except asyncio.CancelledError:
            self._ask(-left)
            for turn in turns:
                turn.cancel()
            raise

    def _ask(self, requests: int) -> None:
        """So many more requests are under way (less, where negative)."""
        self._requests += requests
        if self._requests:
            self._contention.pace("read", self._cost.read_share(self._requests))

    def _queue(self, chunks: int, urgent: bool) -> list[asyncio.Future[None]]:
        """Turns of the drive for all chunks of a block: what is asked for first goes first, what is urgent before."""
        turns: list[asyncio.Future[None]] = []
        for _ in range(chunks):
            turn = self._loop.create_future()
            self._number += 1
            heapq.heappush(self._turns, (not urgent, self._number, turn))
            turns.append(turn)
        if not self._disk_busy:
            self._next()
        return turns

    def _next(self) -> None:
        """The drive is free: the next chunk's turn has come."""
        self._disk_busy = False
        while self._turns:
            *_, turn = heapq.heappop(self._turns)
            if not turn.done():
                self._disk_busy = True
                turn.set_result(None)
                return

    # --- the link ---------------------------------------------------------------------------------------------------

    def before_copy(self, target: Slot) -> None:
        """The copy stream waits for what still uses the slot."""
        guard, target.guard = target.guard, None
        if isinstance(guard, _Copied):
            self._enqueue(0.0, after=guard.passed)

    def copy(self, block: int, source: Slot, target: Slot, start: int, stop: int) -> None:
        """Enqueue a part."""
        nbytes = self._moved[block].copied_nbytes * (stop - start) / source.nbytes
        self._enqueue(self._cost.copy_s(nbytes, max(min(nbytes, self._chunk_nbytes), 1)))
        self.copied_nbytes += round(nbytes)
        self._progress += 1

    def _enqueue(self, seconds: float, after: asyncio.Future[None] | None = None) -> None:
        before, self._tail = self._tail, self._loop.create_future()
        self._keep(self._loop.create_task(self._run_copy(seconds, before, after, self._tail)))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_copy(
        self,
        seconds: float,
        before: asyncio.Future[None] | None,
        after: asyncio.Future[None] | None,
        done: asyncio.Future[None],
    ) -> None:
        for each in (before, after):
            if each is not None:
                await each
        await self._contention.work("copy", seconds)
        done.set_result(None)

    def copied(self) -> Event:
        """After all copies enqueued so far."""
        return _Copied(passed=self._tail) if self._tail is not None and not self._tail.done() else None

    async def wait(self, event: Event) -> None:
        """Until a point of a stream has passed."""
        if isinstance(event, _Copied):
            await asyncio.shield(event.passed)

    def computed(self, passed: asyncio.Future[None]) -> Event:
        """A point of the compute stream."""
        return _Copied(passed=passed)

    def poison(self, slot: Slot) -> None:
        """Simulated bytes need none."""

    def progress(self) -> int:
        """Grows with every chunk."""
        return self._progress
