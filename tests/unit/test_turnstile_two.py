"""Two processors: members give the device up while the CPU computes for them. On a mock clock, with exact order."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.scheduler.turnstile import Turn, Turnstile


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a member does with one block: on the device or on the CPU, or on the device what others do on the CPU."""

    how: Literal["device", "cpu", "part"]
    block: int
    ticks: int = 1
    fails: bool = False
    inner: tuple[Step, ...] = ()
    """What the member does while it holds the block, on the device."""

    @property
    def depth(self) -> int:
        """Blocks that it holds at once, at the most."""
        return (self.how != "cpu") + max((step.depth for step in self.inner), default=0)


@dataclass(frozen=True)
class Call:
    """One root call."""

    steps: tuple[Step, ...]
    breadth: int = 0
    root: int = 0


REST = "rest"
Program = Sequence[Call | str]


def device(block: int, ticks: int = 1) -> Step:
    return Step(how="device", block=block, ticks=ticks)


def cpu(block: int, ticks: int = 1, *, fails: bool = False) -> Step:
    return Step(how="cpu", block=block, ticks=ticks, fails=fails)


def part(block: int, ticks: int = 1) -> Step:
    return Step(how="part", block=block, ticks=ticks)


@dataclass
class Play:
    """Members as generators that take time, as threads would, on two processors."""

    stop_at: int | None = None
    ahead: int = 0
    depth: int = 1
    """Blocks that a member may hold at once."""
    turnstile: Turnstile = field(init=False)
    now: int = 0
    log: list[tuple[int, str, int, int]] = field(default_factory=list)
    """When, where, who, which block."""
    brought: list[Counter[int]] = field(default_factory=list)
    used: dict[int, list[int]] = field(default_factory=dict)
    shared: set[int] = field(default_factory=set)
    inside: Counter[int] = field(default_factory=Counter)
    computing: int | None = None
    """The block that the CPU computes with."""
    on_device: int | None = None
    on_cpu: int | None = None
    events: list[tuple[int, int, int]] = field(default_factory=list)
    bodies: dict[int, Iterator[int | None]] = field(default_factory=dict)

    def run(self, programs: Sequence[Program]) -> Play:
        """Play to the end."""
        self.turnstile = Turnstile(ahead=self.ahead)
        for member, program in enumerate(programs):
            self.bodies[member] = self._member(member, program)
            self.turnstile.join(member)
            self.used[member] = []
        self.on_device = self.turnstile.start()
        if self.on_device is not None:
            self._later(self.on_device, 0)
        while self.events:
            self.now, _, member = heapq.heappop(self.events)
            if self.stop_at is not None and self.now >= self.stop_at:
                self.turnstile.stopping = True
            self._resume(member)
            assert len(self.log) < 100_000, "it goes on for ever"
        assert not self.bodies, f"{sorted(self.bodies)} wait for ever"
        assert not self.shared
        assert self.on_device is None
        assert self.on_cpu is None
        return self

    def _later(self, member: int, ticks: int) -> None:
        heapq.heappush(self.events, (self.now + ticks, len(self.log) * 100 + len(self.events), member))

    def _resume(self, member: int) -> None:
        try:
            ticks = next(self.bodies[member])
        except StopIteration:
            del self.bodies[member]
            assert self.on_device == member, "left without the device"
            self.turnstile.leave(member)
            ticks = None
        if ticks is not None:
            self._later(member, ticks)
        else:
            if self.on_device == member:
                self.on_device = None
            self._carry_out(self.turnstile.turn(member))
            working = self.on_device is not None or self.on_cpu is not None
            assert working or not self.bodies, "nobody goes on, though somebody waits"

    def _carry_out(self, turn: Turn) -> None:
        self.shared -= set(turn.release)
        if turn.begins:
            self.brought.append(Counter())
        if turn.member is not None:
            assert self.on_device is None, "two on the device"
            self.on_device = turn.member
            self._later(turn.member, 0)
        if turn.cpu is not None:
            assert self.on_cpu is None, "two on the CPU"
            self.on_cpu = turn.cpu
            self._later(turn.cpu, 0)

    def _member(self, member: int, program: Program) -> Iterator[int | None]:
        """Yields ticks to spend, or None where it would hand on what it has."""
        turnstile = self.turnstile
        for call in program:
            if isinstance(call, str):
                turnstile.rest(member)
                yield None
                if turnstile.stopping:
                    return
                continue
            turnstile.arrive(member, call.root, breadth=call.breadth)
            yield None
            yield from self._steps(member, call.steps)
            turnstile.finish(member)
            if turnstile.stopping:
                return

    def _steps(self, member: int, steps: Sequence[Step]) -> Iterator[int | None]:
        for step in steps:
            if self.turnstile.stopping:
                break
            if step.how == "device":
                yield from self._on_device(member, step)
            elif step.how == "cpu":
                yield from self._on_cpu(member, step)
            else:
                yield from self._part(member, step)

    def _on_device(self, member: int, step: Step) -> Iterator[int | None]:
        turnstile, block = self.turnstile, step.block
        if not turnstile.wants(member, block):
            yield None
            if turnstile.stopping:
                return
            if block not in self.shared:
                turnstile.shares(block)
                self.shared.add(block)
                spare = 0 if self.depth == 1 else 1  # nested members need not leave room for what comes next
                assert len(self.shared) <= self.depth + spare + self.ahead, "more is kept than there is room for"
                self.brought[-1][block] += 1
        turnstile.uses(member, block)
        self.used[member].append(block)
        self.log.append((self.now, "device", member, block))
        assert step.how == "device" or self.computing != block, "a part on both processors"
        yield step.ticks
        assert self.on_device == member
        yield from self._steps(member, step.inner)
        turnstile.used(member, block)

    def _on_cpu(self, member: int, step: Step) -> Iterator[int | None]:
        turnstile = self.turnstile
        turnstile.crosses(member, step.block, last_block=step.block)
        yield None
        if not turnstile.on_cpu(member):
            assert turnstile.stopping
            return
        assert not self.inside[step.block], "a part on both processors"
        self.computing = step.block
        self.used[member].append(step.block)
        self.log.append((self.now, "cpu", member, step.block))
        yield step.ticks
        assert self.on_cpu == member
        self.on_cpu = self.computing = None
        if step.fails:
            turnstile.stopping = True
        turnstile.crossed(member)
        yield None

    def _part(self, member: int, step: Step) -> Iterator[int | None]:
        turnstile = self.turnstile
        if not turnstile.enters(member, step.block, first_block=step.block):
            yield None
            if turnstile.stopping:
                return
        self.inside[step.block] += 1
        yield from self._on_device(member, step)
        self.inside[step.block] -= 1
        turnstile.left(step.block)
        self._carry_out(turnstile.turn(None))


def on(play: Play, where: str) -> list[tuple[int, int, int]]:
    """Ticks, member and block of what one processor did."""
    return [(now, member, block) for now, place, member, block in play.log if place == where]


def test_two_members_alternate() -> None:
    """While the CPU computes 2 for one, the device computes 1 for the other; then they change places."""
    steps = (device(1), cpu(2), device(3), cpu(4), device(5), cpu(6))
    play = Play().run([[Call(steps)], [Call(steps)]])
    assert on(play, "device") == [(0, 0, 1), (1, 1, 1), (2, 0, 3), (3, 1, 3), (4, 0, 5), (5, 1, 5)]
    assert on(play, "cpu") == [(1, 0, 2), (2, 1, 2), (3, 0, 4), (4, 1, 4), (5, 0, 6), (6, 1, 6)]
    assert play.now == 7, "and not 12"
    assert play.brought == [Counter({1: 1, 3: 1, 5: 1})]


def test_the_slower_processor_is_never_idle() -> None:
    """Three members and a CPU that takes twice as long: the device keeps up, and the CPU goes from one to the next."""
    steps = (device(1), cpu(2, 2), device(3), cpu(4, 2))
    play = Play().run([[Call(steps)]] * 3)
    assert on(play, "cpu") == [(1, 1, 2), (3, 2, 2), (5, 0, 2), (7, 1, 4), (9, 2, 4), (11, 0, 4)]
    assert play.brought == [Counter({1: 1, 3: 1})]


def test_nothing_is_let_go_for_those_who_are_away() -> None:
    """The member that is back first wants 4, when the CPU still computes 2 for another that will want 3."""
    first = Call((device(1), cpu(2), device(3, 0), device(4)))
    second = Call((device(1), cpu(2, 9), device(3, 0), device(4)))
    play = Play().run([[first], [second]])
    assert play.brought == [Counter({1: 1, 3: 1, 4: 1})]
    assert on(play, "device") == [(0, 0, 1), (1, 1, 1), (2, 0, 3), (11, 1, 3), (11, 1, 4), (12, 0, 4)]


def test_blocks_are_kept_for_those_who_are_away() -> None:
    """The member that is back first goes on as far as there is room for what it leaves behind."""
    steps = (device(1, 0), cpu(2, 5), device(3), device(4), device(5), cpu(6))
    play = Play(ahead=1).run([[Call(steps)], [Call(steps)]])
    assert on(play, "cpu") == [(0, 0, 2), (5, 1, 2), (13, 1, 6), (14, 0, 6)]
    assert on(play, "device")[2:] == [(5, 0, 3), (6, 0, 4), (10, 1, 3), (11, 1, 4), (12, 1, 5), (13, 0, 5)]
    play = Play(ahead=2).run([[Call(steps)], [Call(steps)]])
    assert on(play, "device")[2:] == [(5, 0, 3), (6, 0, 4), (7, 0, 5), (10, 1, 3), (11, 1, 4), (12, 1, 5)]
    assert on(play, "cpu") == [(0, 0, 2), (5, 1, 2), (10, 0, 6), (13, 1, 6)]
    assert play.brought == [Counter({1: 1, 3: 1, 4: 1, 5: 1})]


def test_a_prompt_beside_tokens() -> None:
    """It goes first, and has each part before the CPU computes it for the others, who follow."""
    prompt = Call((device(1), part(2, 4), device(3), part(4, 4)), breadth=9)
    tokens = Call((device(1), cpu(2), device(3), cpu(4)))
    play = Play().run([[tokens], [prompt], [tokens]])
    assert on(play, "device") == [
        (0, 1, 1), (1, 2, 1), (2, 0, 1), (3, 1, 2), (7, 1, 3), (8, 2, 3), (9, 0, 3), (10, 1, 4)
    ]  # fmt: skip
    assert on(play, "cpu") == [(7, 2, 2), (8, 0, 2), (14, 2, 4), (15, 0, 4)]
    assert play.brought == [Counter({1: 1, 2: 1, 3: 1, 4: 1})]


def test_who_waits_for_the_cpu_to_leave_goes_before_others_begin_there() -> None:
    prompt = Call((device(1), part(2, 4)))
    tokens = Call((device(1), cpu(2, 3)))
    play = Play().run([[tokens], [tokens], [prompt]])
    assert on(play, "device") == [(0, 1, 1), (1, 2, 1), (2, 0, 1), (4, 2, 2)]
    assert on(play, "cpu") == [(1, 1, 2), (8, 0, 2)]


def test_members_are_between_sweeps_while_others_are_away() -> None:
    """A sweep ends when the last one is back, and the next one begins with all of them."""
    play = Play().run([[Call((device(1),))] * 2, [Call((device(1), cpu(2, 5)))] * 2])
    assert on(play, "cpu") == [(2, 1, 2), (9, 1, 2)]
    assert play.turnstile.ended == 2
    assert play.brought == [Counter({1: 1})] * 2


def test_stopped_while_one_is_away_and_one_waits_for_the_cpu() -> None:
    steps = (device(1), cpu(2, 5), device(3))
    play = Play(stop_at=4).run([[Call(steps)]] * 3)
    assert on(play, "cpu") == [(1, 1, 2)]
    assert [block for _, _, block in on(play, "device")] == [1, 1, 1]


ticks = st.integers(0, 3)
ascending = st.lists(st.integers(0, 9), max_size=8, unique=True).map(sorted)
kinds = st.lists(st.booleans(), min_size=10, max_size=10)


@settings(max_examples=300)
@given(
    blocks=ascending,
    there=kinds,
    members=st.integers(1, 5),
    calls=st.integers(1, 3),
    ahead=st.integers(0, 3),
    data=st.data(),
)
def test_alike_members_bring_each_block_once(
    blocks: list[int], there: list[bool], members: int, calls: int, ahead: int, data: st.DataObject
) -> None:
    """However long anything takes, on either processor."""

    def call() -> Call:
        return Call(tuple((cpu if there[block] else device)(block, data.draw(ticks)) for block in blocks))

    play = Play(ahead=ahead).run([[call() for _ in range(calls)] for _ in range(members)])
    assert play.used == dict.fromkeys(range(members), blocks * calls)
    assert play.brought == [Counter(block for block in blocks if not there[block])] * calls
    assert play.turnstile.ended == calls


@settings(max_examples=300)
@given(
    blocks=ascending,
    there=kinds,
    wide=st.lists(st.booleans(), min_size=1, max_size=5),
    ahead=st.integers(0, 3),
    data=st.data(),
)
def test_prompts_beside_tokens_bring_each_block_once(
    blocks: list[int], there: list[bool], wide: list[bool], ahead: int, data: st.DataObject
) -> None:
    """Some have on the device what the CPU computes for the others."""

    def call(whole: bool) -> Call:
        how = {True: part if whole else cpu, False: device}
        return Call(tuple(how[there[block]](block, data.draw(ticks)) for block in blocks), breadth=int(whole))

    play = Play(ahead=ahead).run([[call(whole)] for whole in wide])
    assert play.used == dict.fromkeys(range(len(wide)), blocks)
    expected = Counter(block for block in blocks if any(wide) or not there[block])
    assert play.brought == [expected]


steps_of_any_kind = st.builds(
    Step,
    how=st.sampled_from(["device", "cpu", "part"]),
    block=st.integers(0, 6),
    ticks=ticks,
    fails=st.sampled_from([False] * 30 + [True]),
)
calls_of_any_kind = st.builds(
    Call, st.lists(steps_of_any_kind, max_size=6).map(tuple), st.integers(0, 2), st.integers(0, 1)
)


@settings(max_examples=500)
@given(
    programs=st.lists(st.lists(calls_of_any_kind | st.just(REST), max_size=4), max_size=5),
    stop_at=st.none() | st.integers(0, 30),
    ahead=st.integers(0, 2),
)
def test_whoever_can_go_on_does(programs: list[list[Call | str]], stop_at: int | None, ahead: int) -> None:
    """Any members, in any order, that fail on the CPU or are stopped in the middle: all end."""
    fails = any(step.fails for program in programs for call in program if isinstance(call, Call) for step in call.steps)
    play = Play(stop_at=stop_at, ahead=ahead).run(programs)
    if stop_at is None and not fails:
        for member, program in enumerate(programs):
            steps = [step.block for call in program if isinstance(call, Call) for step in call.steps]
            assert play.used[member] == steps


@pytest.mark.parametrize("away", [True, False])
def test_a_block_in_use_is_kept_whoever_is_away(away: bool) -> None:
    """A call that holds a block may give the device up in the middle."""
    turnstile = Turnstile()
    turnstile.join(0)
    turnstile.join(1)
    assert turnstile.start() == 0
    turnstile.arrive(0, 0)
    assert turnstile.turn(0).member == 1
    turnstile.arrive(1, 0)
    assert turnstile.turn(1).member == 1
    assert not turnstile.wants(1, 1)
    assert turnstile.turn(1).member == 0
    assert not turnstile.wants(0, 1)
    assert turnstile.turn(0).member == 0
    turnstile.shares(1)
    turnstile.uses(0, 1)
    if away:
        turnstile.crosses(0, "part", last_block=2)
        assert turnstile.turn(0) == Turn(member=1, cpu=0)
    else:
        assert not turnstile.wants(0, 2)
        assert turnstile.turn(0).member == 1
    assert not turnstile.wants(1, 2)
    assert turnstile.turn(1).release == ()
