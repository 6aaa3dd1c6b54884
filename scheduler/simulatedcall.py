"""One call of a model in a simulation: its modules lease blocks, and its operations take time on either processor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import msgspec

from .contention import Contention
from .core import Core
from .cost import CostModel
from .hardware import Where
from .lease import Lease, Wish
from .mover import Event
from .operations import Operation
from .program import Enter, Leave, Program
from .setting import Setting
from .simulated import SimulatedMover
from .simulatedlanes import Gate
from .virtualtime import VirtualLoop


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A module at work."""

    path: str
    start_ns: int
    end_ns: int
    depth: int


@dataclass(kw_only=True, slots=True)
class _Frame:
    """A module under way."""

    path: str
    began_ns: int
    leases: list[Lease] = field(default_factory=list)
    where: Where
    on_host: bool = False
    """Whether the leases are of the host's copies."""
    held: AsyncExitStack | None = None
    """What ends with it, where it is computed on the CPU or is kept from it."""
    device_ns: list[int] = field(default_factory=list)
    """When the device began and ended what the module asked of it."""


class Stage:
    """What all calls share: the processors, and what has been noted.

    Args:
        separate: Whether the device has memory of its own.
    """

    def __init__(
        self, loop: VirtualLoop, contention: Contention, cost: CostModel, mover: SimulatedMover, *, separate: bool
    ) -> None:
        self.loop = loop
        self.contention = contention
        self.cost = cost
        self.mover = mover
        self.separate = separate
        self.spans: list[Span] = []
        self.compute_s = 0.0
        self.ahead: asyncio.Future[None] | None = None
        """When the device has done all that it has been asked for; None where the host waits for it anyway."""
        self._tasks: set[asyncio.Task[None]] = set()

    def follow(self, work: Awaitable[None]) -> None:
        """Let the device do something once it has done all that it was asked for before."""
        before, self.ahead = self.ahead, self.loop.create_future()
        task = self.loop.create_task(_after(before, work, self.ahead))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def computed(self) -> Event:
        """A point of the device's stream, after all that."""
        return None if self.ahead is None or self.ahead.done() else self.mover.computed(self.ahead)

    async def granted(self, wish: Lease | Wish) -> Lease:
        """Wait for a lease; then, if it has to, for the last copy of the block."""
        if isinstance(wish, Wish):
            there = self.loop.create_future()
            wish.granted.add_done_callback(lambda _: there.set_result(None))
            await there
            wish = wish.granted.result()
        event = wish.residence.event
        if event is not None:
            if self.separate:  # the device waits, the host goes on
                self.follow(self.mover.wait(event))
            else:
                await self.mover.wait(event)
        return wish


class Caller:
    """Makes calls, one after another."""

    def __init__(self, stage: Stage, setting: Setting, core: Core, gate: Gate) -> None:
        self._stage = stage
        self._setting = setting
        self._parts = setting.parts()
        self._core = core
        self._gate = gate

    async def call(self, program: Program) -> None:
        """One root call, until somebody has looked at its result."""
        stage, rows = self._stage, rows_of(program)
        stack: list[_Frame] = [_Frame(path="", began_ns=0, where="gpu")]
        pending: list[Operation] = []
        done: list[tuple[_Frame, int, int]] = []
        await self._gate.begin(self._setting.root_of(rows_of_root(program)))
        for event in program.events:
            frame = stack[-1]
            if isinstance(event, Operation):
                pieces = self._setting.pieces.get(frame.path, ()) if event.kind == "linear" else ()
                if pieces and frame.where == "gpu":
                    await self._by_pieces(event, pieces, stack)
                else:
                    pending.append(event)
                continue
            await self._compute(pending, stack)
            pending.clear()
            if isinstance(event, Enter):
                stack.append(await self._enter(event.path, rows, frame.where))
            else:
                stack.pop()
                await self._leave(frame)
                done.append((frame, stage.loop.nanoseconds(), len(stack) - 1))
        await self._compute(pending, stack)
        if stage.ahead is not None:
            await stage.ahead  # somebody looks at the result
        await self._gate.end()
        for frame, ended_ns, depth in done:
            start, end = (frame.device_ns[0], frame.device_ns[-1]) if frame.device_ns else (frame.began_ns, ended_ns)
            stage.spans.append(Span(path=frame.path, start_ns=start, end_ns=end, depth=depth))

    async def _enter(self, path: str, rows: Mapping[str, float], where: Where) -> _Frame:
        frame = _Frame(path=path, began_ns=self._stage.loop.nanoseconds(), where=where)
        if where == "cpu":  # what is called there leases nothing
            return frame
        part = self._parts.get(path, ())
        if part and all(self._gate.on_cpu(block) for block in part):
            frame.held = AsyncExitStack()
            if all(self._setting.on_cpu.get(block, 0) > rows[path] for block in part):
                await self._cross(frame, part)
                return frame
            await frame.held.enter_async_context(self._gate.inside(path, part))
        for block in self._setting.uses.get(path, ()):
            frame.leases.append(await self._gate.acquire(block))
        return frame

    async def _leave(self, frame: _Frame) -> None:
        for lease in frame.leases:
            if frame.on_host:
                self._core.release(lease, None)
            else:
                self._gate.release(lease)
        if frame.held is not None:
            await frame.held.aclose()

    async def _cross(self, frame: _Frame, part: Sequence[int]) -> None:
        """Go to the CPU: inputs follow, and results come back, which are two waits for the link."""
        assert frame.held is not None
        inputs, link = self._stage.ahead, self._stage.cost.hardware.link
        await frame.held.enter_async_context(self._gate.away(frame.path or None, part))
        frame.where, frame.on_host = "cpu", True
        for block in part:
            frame.leases.append(await self._stage.granted(self._core.acquire_host_nowait(block)))
        if inputs is not None:
            await inputs
        await asyncio.sleep(2 * link.latency_s if link is not None else 0.0)

    async def _by_pieces(self, operation: Operation, pieces: Sequence[int], stack: Sequence[_Frame]) -> None:
        """A product with a table: piece by piece, each leased while it is used."""
        total = sum(self._setting.moved[piece].read_nbytes for piece in pieces) or 1
        for piece in pieces:
            share = self._setting.moved[piece].read_nbytes / total
            part = msgspec.structs.replace(operation, nbytes=operation.nbytes * share)
            if self._gate.on_cpu(piece) and self._setting.on_cpu.get(piece, 0) > operation.rows:
                frame = _Frame(path="", began_ns=0, where="gpu", held=AsyncExitStack())
                await self._cross(frame, (piece,))
                await self._compute([part], [frame])
                await self._leave(frame)
                continue
            lease = await self._gate.acquire(piece)
            await self._compute([part], stack)
            self._gate.release(lease)

    async def _compute(self, operations: Sequence[Operation], stack: Sequence[_Frame]) -> None:
        """Operations of the innermost module under way."""
        if not operations:
            return
        stage, where = self._stage, stack[-1].where
        hardware = stage.cost.hardware
        seconds = stage.cost.compute_s(operations, where)
        stage.compute_s += seconds
        started, worked = stage.cost.parts_s(operations, where)
        if stage.separate and where == "gpu" and not hardware.emulated:
            await asyncio.sleep(0)  # the executor goes on meanwhile, however little time it takes
            await stage.contention.work("launch", started)
            stage.follow(self._on_device(seconds, tuple(stack)))
            return
        if stage.ahead is not None and where == "gpu":
            await stage.ahead  # what it computes from has to be there
        await stage.contention.work("start", started)
        await stage.contention.work("compute", worked)

    async def _on_device(self, seconds: float, frames: Sequence[_Frame]) -> None:
        began = self._stage.loop.nanoseconds()
        await asyncio.sleep(seconds)
        for frame in frames:
            frame.device_ns.extend((began, self._stage.loop.nanoseconds()))


async def _after(before: asyncio.Future[None] | None, work: Awaitable[None], done: asyncio.Future[None]) -> None:
    if before is not None:
        await before
    await work
    done.set_result(None)


def rows_of(program: Program) -> Mapping[str, float]:
    """The rows that each module is called with: of the first product in it."""
    found: dict[str, float] = {}
    stack: list[str] = []
    for event in program.events:
        if isinstance(event, Enter):
            stack.append(event.path)
        elif isinstance(event, Leave):
            stack.pop()
        elif event.kind == "linear":
            for path in stack:
                found.setdefault(path, event.rows)
    return _Default(found)


def rows_of_root(program: Program) -> float:
    """The rows that a call is made with: of its first product."""
    products = (event for event in program.events if isinstance(event, Operation) and event.kind == "linear")
    first = next(products, None)
    return float("inf") if first is None else first.rows


class _Default(dict[str, float]):
    def __missing__(self, key: str) -> float:
        return float("inf")
