"""A run before it happens: the executor's own decisions, on a simulated clock, at the rates of a machine.

Nothing of the policy is imitated: `Core` decides, as in a real run, over slots without memory. Only the time that
reads, copies and operations take is made up, by the cost model. The timeline that comes out has the schema of a real
one.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from ..memory.arena import AnyArena
from ..memory.requests import CHUNK
from .contention import Contention, speeds_of
from .core import Core
from .cost import CostModel
from .order import AccessOrders
from .program import Program
from .residence import Tier
from .setting import Ring, Setting
from .simulated import Moved, SimulatedMover
from .simulatedcall import Caller, Span, Stage, rows_of_root
from .simulatedlanes import Alone, Lanes
from .tally import ExecutorStatistics
from .timeline import Record, Timeline
from .virtualtime import VirtualLoop, run_virtually

INFLIGHT: Final = 64 * 2**20
STEADY: Final = 1e-3
"""By how much two calls may differ that take the same."""


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
    lanes: int = 1,
    part: Collection[int] = frozenset(),
) -> Prediction:
    """Run programs one after another.

    Args:
        programs: Calls of the root, in order.
        started: Whether what stays is there before the first call, and the ring is full: a warm model.
        until_steady: Whether to stop as soon as a call has taken what the one before it, of the same kind, took.
        lanes: Micro-batches that each make all these calls, and share sweeps. A turn is a sweep then.
        part: Of several lanes: blocks that the CPU computes for some while others go on on the device.
    """
    first = setting.root_of(rows_of_root(programs[0])) if programs and (part or lanes == 1) else 0
    return _Simulation(setting, cost, first, part).run(programs, started, until_steady, lanes, part)


class _Simulation:
    def __init__(self, setting: Setting, cost: CostModel, first: int, part: Collection[int]) -> None:
        self._setting = setting
        self._cost = cost
        self._loop = loop = VirtualLoop()
        contention = Contention(
            loop, speeds_of(cost.hardware.sharing, crowded=cost.crowded), processors=cost.processors_at_once
        )
        self._records: list[Record] = []
        timeline = Timeline(capacity=1)
        timeline.listener = self._records.append  # is told of uses, too
        self._turns: list[Turn] = []
        self._last = sys.maxsize
        """Calls that are made, where not all are."""
        self._mover = SimulatedMover(
            loop=loop, contention=contention, cost=cost, moved=setting.moved, chunk_nbytes=CHUNK
        )
        separate = cost.hardware.gpu is not None and setting.back is not None
        self._stage = Stage(loop, contention, cost, self._mover, separate=separate)
        self._core = Core(
            front=_tier("device" if setting.back else "host", setting.front, setting.moved),
            back=_tier("host", setting.back, setting.moved) if setting.back else None,
            nbytes={block: moved.read_nbytes for block, moved in setting.moved.items()},
            mover=self._mover,
            orders=AccessOrders(lambda root: setting.guess(cast(int, root), part), first=first),
            clock=loop.nanoseconds,
            timeline=timeline,
            on_cpu=sorted(setting.on_cpu),
            inflight_nbytes=max(INFLIGHT, 2 * max((m.read_nbytes for m in setting.moved.values()), default=0)),
        )

    def run(
        self, programs: Sequence[Program], started: bool, until_steady: bool, lanes: int, part: Collection[int]
    ) -> Prediction:
        run_virtually(self._loop, self._run(programs, started, until_steady, lanes, part))
        return Prediction(
            turns=tuple(self._turns),
            spans=tuple(self._stage.spans),
            records=tuple(self._records),
            compute_s=self._stage.compute_s,
            read_nbytes=self._mover.read_nbytes,
            copied_nbytes=self._mover.copied_nbytes,
            statistics=self._core.statistics(),
        )

    async def _run(
        self, programs: Sequence[Program], started: bool, until_steady: bool, lanes: int, part: Collection[int]
    ) -> None:
        self._core.attach(self._loop)
        if started:
            await asyncio.sleep(1 + 3 * self._all_s())
        if lanes == 1:
            await self._alone(programs, until_steady)
        else:
            await self._together(programs, until_steady, lanes, part)

    async def _alone(self, programs: Sequence[Program], until_steady: bool) -> None:
        stage = self._stage
        alone = Alone(self._core, stage.granted, stage.computed, self._cost.lending_s)
        caller = Caller(stage, self._setting, self._core, alone)
        for program in programs:
            start = self._loop.nanoseconds()
            await caller.call(program)
            self._note(program, program.tokens, start)
            if until_steady and _steady(self._turns):
                break

    async def _together(
        self, programs: Sequence[Program], until_steady: bool, count: int, part: Collection[int]
    ) -> None:
        """Every lane makes the same calls, so that the calls of a sweep are all of one program."""
        began = 0

        def swept(begins: bool) -> None:
            nonlocal began
            if begins:
                began = self._loop.nanoseconds()
                return
            program = programs[len(self._turns)]
            self._note(program, count * program.tokens, began)
            if until_steady and _steady(self._turns):
                self._last = min(self._last, len(self._turns) + 1)  # some lanes wait for one more sweep already

        stage, setting = self._stage, self._setting
        lanes = Lanes(
            self._core,
            stage.granted,
            stage.computed,
            members=count,
            resident=setting.front.permanent.keys(),
            part=part,
            ahead=setting.spare_slots,
            switch_s=self._cost.switch_s,
            hand_over_s=self._cost.hand_over_s,
            swept=swept,
        )

        async def lane(member: int) -> None:
            caller = Caller(stage, setting, self._core, lanes.member(member))
            await lanes.join(member)
            for number, program in enumerate(programs):
                if number < self._last:
                    await caller.call(program)
            lanes.leave(member)

        lanes.start()
        await asyncio.gather(*(lane(member) for member in range(count)))

    def _note(self, program: Program, tokens: int, start_ns: int) -> None:
        end = self._loop.nanoseconds()
        self._turns.append(Turn(title=program.title, tokens=tokens, start_ns=start_ns, end_ns=end))

    def _all_s(self) -> float:
        """Seconds of bringing every block once."""
        moved = self._setting.moved.values()
        read_s = self._cost.read_s(sum(m.read_nbytes for m in moved), CHUNK) if self._cost.hardware.drives else 0.0
        return read_s + self._cost.copy_s(sum(m.copied_nbytes for m in moved), CHUNK)


def _steady(turns: Sequence[Turn]) -> bool:
    last = turns[-3:]
    same = len(last) == 3 and len({turn.title for turn in last}) == 1
    return same and abs(last[2].seconds - last[1].seconds) <= STEADY * last[2].seconds


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
