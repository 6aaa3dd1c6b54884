"""A run before it happens: the executor's own decisions, on a simulated clock, at the rates of a machine.

Nothing of the policy is imitated: `Core` decides, as in a real run, over slots without memory. Only the time that
reads, copies and operations take is made up, by the cost model. The timeline that comes out has the schema of a real
one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from ..memory.arena import AnyArena
from .contention import Contention, speeds_of
from .core import Core
from .cost import CostModel
from .hardware import Where
from .lease import Lease, Wish
from .operations import Operation
from .order import AccessOrders
from .program import Enter, Leave, Program
from .residence import Tier
from .simulated import Moved, SimulatedMover
from .tally import ExecutorStatistics
from .timeline import Record, Timeline
from .virtualtime import VirtualLoop, run_virtually

CHUNK: Final = 4 * 2**20
INFLIGHT: Final = 64 * 2**20
STEADY: Final = 1e-3
"""By how much two calls may differ that take the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ring:
    """The slots of one tier."""

    permanent: Mapping[int, int]
    """Bytes of the slot of each block that stays."""
    slots: int
    slot_nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a plan makes of a model, as far as time is concerned."""

    moved: Mapping[int, Moved]
    """By block."""
    front: Ring
    back: Ring | None
    uses: Mapping[str, tuple[int, ...]]
    """Blocks that each module's forward leases, in order."""
    pieces: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Blocks that a module leases one after another, each with its part of the module's operations."""
    on_cpu: Mapping[int, int] = field(default_factory=dict)
    """By block that stays on the host: calls of fewer rows are computed there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A module at work."""

    path: str
    start_ns: int
    end_ns: int
    depth: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One call of the root."""

    title: str
    tokens: int
    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return (self.end_ns - self.start_ns) / 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What would happen."""

    turns: tuple[Turn, ...]
    spans: tuple[Span, ...]
    records: tuple[Record, ...]
    compute_s: float
    """Work of the processors, without waiting."""
    read_nbytes: int
    copied_nbytes: int
    statistics: ExecutorStatistics

    def seconds(self, title: str) -> float:
        """The usual time of the calls of a kind: of those but the first few, whose order is still being learned."""
        found = [turn.seconds for turn in self.turns if turn.title == title]
        steady = sorted(found[min(2, len(found) - 1) :]) if found else [0.0]
        return steady[len(steady) // 2]


def simulate(
    setting: Setting,
    programs: Sequence[Program],
    cost: CostModel,
    *,
    started: bool = True,
    until_steady: bool = False,
) -> Prediction:
    """Run programs one after another.

    Args:
        programs: Calls of the root, in order.
        started: Whether what stays is there before the first call, and the ring is full: a warm model.
        until_steady: Whether to stop as soon as a call has taken what the one before it, of the same kind, took.
    """
    return _Simulation(setting, cost).run(programs, started=started, until_steady=until_steady)


@dataclass(kw_only=True, slots=True)
class _Frame:
    """A module under way."""

    path: str
    began_ns: int
    leases: list[Lease]
    where: Where
    device_ns: list[int] = field(default_factory=list)
    """When the device began and ended what the module asked of it."""


class _Simulation:
    def __init__(self, setting: Setting, cost: CostModel) -> None:
        self._setting = setting
        self._cost = cost
        self._loop = VirtualLoop()
        self._contention = Contention(self._loop, speeds_of(cost.hardware.sharing))
        self._records: list[Record] = []
        timeline = Timeline(capacity=1)
        timeline.listener = self._records.append  # is told of uses, too
        self._spans: list[Span] = []
        self._compute_s = 0.0
        self._ahead: asyncio.Future[None] | None = None
        """When the device has done all that the host has asked for; None where both are one."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._separate = cost.hardware.gpu is not None and setting.back is not None
        self._mover = SimulatedMover(
            loop=self._loop, contention=self._contention, cost=cost, moved=setting.moved, chunk_nbytes=CHUNK
        )
        order = tuple(dict.fromkeys(block for blocks in setting.uses.values() for block in blocks))
        self._core = Core(
            front=_tier("device" if setting.back else "host", setting.front, setting.moved),
            back=_tier("host", setting.back, setting.moved) if setting.back else None,
            nbytes={block: moved.read_nbytes for block, moved in setting.moved.items()},
            mover=self._mover,
            orders=AccessOrders(lambda root: order, first=0),
            clock=self._loop.nanoseconds,
            timeline=timeline,
            on_cpu=sorted(setting.on_cpu),
            inflight_nbytes=max(INFLIGHT, 2 * max((m.read_nbytes for m in setting.moved.values()), default=0)),
        )

    def run(self, programs: Sequence[Program], *, started: bool, until_steady: bool) -> Prediction:
        turns = run_virtually(self._loop, self._run(programs, started, until_steady))
        return Prediction(
            turns=tuple(turns),
            spans=tuple(self._spans),
            records=tuple(self._records),
            compute_s=self._compute_s,
            read_nbytes=self._mover.read_nbytes,
            copied_nbytes=self._mover.copied_nbytes,
            statistics=self._core.statistics(),
        )

    async def _run(self, programs: Sequence[Program], started: bool, until_steady: bool) -> list[Turn]:
        self._core.attach(self._loop)
        if started:
            await asyncio.sleep(1 + 3 * self._all_s())
        turns = []
        for program in programs:
            start = self._loop.nanoseconds()
            self._core.begin(0)
            await self._call(program)
            self._core.end(failed=False)
            end = self._loop.nanoseconds()
            turns.append(Turn(title=program.title, tokens=program.tokens, start_ns=start, end_ns=end))
            if until_steady and _steady(turns):
                break
        return turns

    def _all_s(self) -> float:
        """Seconds of bringing every block once."""
        moved = self._setting.moved.values()
        read_s = self._cost.read_s(sum(m.read_nbytes for m in moved), CHUNK) if self._cost.hardware.drives else 0.0
        return read_s + self._cost.copy_s(sum(m.copied_nbytes for m in moved), CHUNK)

    async def _call(self, program: Program) -> None:
        rows = _rows(program)
        stack: list[_Frame] = [_Frame(path="", began_ns=0, leases=[], where="gpu")]
        pending: list[Operation] = []
        done: list[tuple[_Frame, int, int]] = []
        for event in program.events:
            frame = stack[-1]
            if isinstance(event, Operation):
                pieces = self._setting.pieces.get(frame.path, ()) if event.kind == "linear" else ()
                if pieces:
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
                self._release(frame.leases)
                done.append((frame, self._loop.nanoseconds(), len(stack) - 1))
        await self._compute(pending, stack)
        if self._ahead is not None:
            await self._ahead  # somebody looks at the result
        for frame, ended_ns, depth in done:
            start, end = (frame.device_ns[0], frame.device_ns[-1]) if frame.device_ns else (frame.began_ns, ended_ns)
            self._spans.append(Span(path=frame.path, start_ns=start, end_ns=end, depth=depth))

    async def _enter(self, path: str, rows: Mapping[str, float], where: Where) -> _Frame:
        began = self._loop.nanoseconds()
        blocks = self._setting.uses.get(path, ())
        if blocks and all(self._setting.on_cpu.get(block, 0) > rows[path] for block in blocks):
            await self._cross()
            return _Frame(path=path, began_ns=began, leases=[], where="cpu")
        return _Frame(path=path, began_ns=began, leases=[await self._acquire(block) for block in blocks], where=where)

    async def _by_pieces(self, operation: Operation, pieces: Sequence[int], stack: Sequence[_Frame]) -> None:
        """A product with a table: piece by piece, each leased while it is used."""
        total = sum(self._setting.moved[piece].read_nbytes for piece in pieces) or 1
        for piece in pieces:
            share = self._setting.moved[piece].read_nbytes / total
            part = msgspec.structs.replace(operation, nbytes=operation.nbytes * share)
            if self._setting.on_cpu.get(piece, 0) > operation.rows:
                frame = _Frame(path=stack[-1].path, began_ns=0, leases=[], where="cpu")
                await self._cross()
                await self._compute([part], [frame])
                continue
            lease = await self._acquire(piece)
            await self._compute([part], stack)
            self._release([lease])

    async def _cross(self) -> None:
        """Inputs go to the CPU, and results come back: two waits for the link."""
        if self._ahead is not None:
            await self._ahead
        link = self._cost.hardware.link
        await asyncio.sleep(2 * link.latency_s if link is not None else 0.0)

    async def _compute(self, operations: Sequence[Operation], stack: Sequence[_Frame]) -> None:
        """Operations of the innermost module under way."""
        if not operations:
            return
        where = stack[-1].where
        seconds = self._cost.compute_s(operations, where)
        self._compute_s += seconds
        if not self._separate or where == "cpu":
            if self._ahead is not None:
                await self._ahead  # what it computes from has to be there
            started, worked = self._cost.parts_s(operations, where)
            await self._contention.work("start", started)
            await self._contention.work("compute", worked)
            return
        gpu = self._cost.hardware.gpu
        assert gpu is not None
        await asyncio.sleep(sum(operation.launches for operation in operations) * gpu.launch_s)
        self._follow(self._on_device(seconds, tuple(stack)))

    async def _on_device(self, seconds: float, frames: Sequence[_Frame]) -> None:
        began = self._loop.nanoseconds()
        await asyncio.sleep(seconds)
        for frame in frames:
            frame.device_ns.extend((began, self._loop.nanoseconds()))

    def _follow(self, work: Awaitable[None]) -> None:
        """Let the device do something once it has done all that it was asked for before."""
        before, self._ahead = self._ahead, self._loop.create_future()
        task = self._loop.create_task(_after(before, work, self._ahead))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _acquire(self, block: int) -> Lease:
        got = self._core.acquire_nowait(block)
        lease = got if isinstance(got, Lease) else await self._granted(got)
        event = lease.residence.event
        if event is not None:
            if self._separate:  # the device waits, the host goes on
                self._follow(self._mover.wait(event))
            else:
                await self._mover.wait(event)
        return lease

    async def _granted(self, wish: Wish) -> Lease:
        there = self._loop.create_future()
        wish.granted.add_done_callback(lambda _: there.set_result(None))
        await there
        return wish.granted.result()

    def _release(self, leases: Sequence[Lease]) -> None:
        event = None if self._ahead is None or self._ahead.done() else self._mover.computed(self._ahead)
        for lease in leases:
            self._core.release(lease, event)


def _steady(turns: Sequence[Turn]) -> bool:
    last = turns[-3:]
    same = len(last) == 3 and len({turn.title for turn in last}) == 1
    return same and abs(last[2].seconds - last[1].seconds) <= STEADY * last[2].seconds


async def _after(before: asyncio.Future[None] | None, work: Awaitable[None], done: asyncio.Future[None]) -> None:
    if before is not None:
        await before
    await work
    done.set_result(None)


def _tier(name: str, ring: Ring, moved: Mapping[int, Moved]) -> Tier:
    """Slots with no memory behind them."""
    sizes = [*ring.permanent.values(), *([ring.slot_nbytes] * ring.slots)]
    arena = AnyArena(tier=name, nbytes=sum(-(-size // 4096) * 4096 for size in sizes) or 4096)
    return Tier(
        name=name,
        permanent={block: arena.cut(nbytes) for block, nbytes in ring.permanent.items()},
        ring=[arena.cut(ring.slot_nbytes) for _ in range(ring.slots)],
        sizes={block: max(m.read_nbytes, m.copied_nbytes) for block, m in moved.items()},
    )


def _rows(program: Program) -> Mapping[str, float]:
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


class _Default(dict[str, float]):
    def __missing__(self, key: str) -> float:
        return float("inf")
