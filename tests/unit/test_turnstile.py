"""Who goes on when several members pass through the same blocks: order, reads, and that nobody is forgotten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.scheduler.turnstile import Turnstile

Call = tuple[Hashable, Sequence[int]]
"""A root call: its root, and the blocks that it uses."""
REST = "rest"
FAIL = "fail"


@dataclass
class Play:
    """Members as generators, of which one runs at a time: what the threads do, without threads."""

    turnstile: Turnstile = field(default_factory=Turnstile)
    log: list[tuple[str, object]] = field(default_factory=list)
    brought: list[Counter[int]] = field(default_factory=list)
    """By sweep: how often each block was brought."""
    used: dict[int, list[int]] = field(default_factory=dict)
    shared: set[int] = field(default_factory=set)

    def run(self, programs: Sequence[Sequence[Call | str]]) -> Play:
        """Play to the end."""
        bodies = {member: self._member(member, program) for member, program in enumerate(programs)}
        for member in bodies:
            self.turnstile.join(member)
            self.used[member] = []
        running: int | None = 0 if bodies else None
        for _ in range(100_000):
            if running is None:
                return self
            ended = next(bodies[running], None) is None
            if ended:
                self.turnstile.leave(running)
            turn = self.turnstile.turn(running)
            self.log += [("release", block) for block in turn.release]
            self.shared -= set(turn.release)
            self.log += [("end", self.turnstile.ended)] * turn.ends + [("begin", turn.root)] * turn.begins
            if turn.begins:
                self.brought.append(Counter())
            running = turn.member
        raise AssertionError("it goes on for ever")

    def _member(self, member: int, program: Sequence[Call | str]) -> Iterator[bool]:
        """Yields when it would hand the baton over."""
        for step in program:
            if step == FAIL:
                self.turnstile.stopping = True
                return
            if step == REST:
                self.turnstile.rest(member)
                yield True
            else:
                assert not isinstance(step, str)
                root, blocks = step
                self.turnstile.arrive(member, root)
                yield True
                if self.turnstile.stopping:
                    return
                for block in blocks:
                    if not self.turnstile.wants(member, block):
                        yield True
                        if self.turnstile.stopping:
                            return
                        if block not in self.shared:
                            self.turnstile.shares(block)
                            self.shared.add(block)
                            self.brought[-1][block] += 1
                            self.log.append(("bring", block))
                    self.turnstile.uses(member, block)
                    self.used[member].append(block)
                    self.log.append((f"use {member}", block))
                    self.turnstile.used(member, block)
                self.turnstile.finish(member)


def test_zig_zag() -> None:
    """All use a block before the next is brought; who used it last begins with the next one."""
    play = Play().run([[(0, (1, 2))], [(0, (1, 2))]])
    assert play.log == [
        ("begin", 0),
        ("bring", 1), ("use 0", 1), ("use 1", 1), ("release", 1),
        ("bring", 2), ("use 1", 2), ("use 0", 2), ("release", 2),
        ("end", 1),
    ]  # fmt: skip


def test_one_member_alone_is_a_plain_run() -> None:
    play = Play().run([[(0, (1, 2, 1)), (0, (1,))]])
    assert [event for event in play.log if event[0].startswith("use")] == [("use 0", b) for b in (1, 2, 1, 1)]
    assert play.turnstile.ended == 2


def test_a_member_that_ends_early_is_not_waited_for() -> None:
    play = Play().run([[(0, (1, 2))] * 3, [(0, (1, 2))]])
    assert play.brought == [Counter({1: 1, 2: 1})] * 3


def test_roots_take_turns() -> None:
    """An encoder that one member begins with has a sweep of its own; the others wait meanwhile."""
    play = Play().run([[("encoder", (1,)), ("decoder", (2, 3))], [("decoder", (2, 3))] * 2])
    roots = [event[1] for event in play.log if event[0] == "begin"]
    assert roots == ["encoder", "decoder", "decoder"] or roots == ["decoder", "encoder", "decoder"]


def test_who_rests_comes_back_after_a_sweep() -> None:
    play = Play().run([[(0, (1,))] * 3, [REST, (0, (1,)), (0, (1,))]])
    assert play.used == {0: [1, 1, 1], 1: [1, 1]}
    assert len(play.brought) == 3


def test_who_rests_alone_comes_back_at_once() -> None:
    play = Play().run([[REST, REST, (0, (1,))]])
    assert play.used[0] == [1]


sorted_blocks = st.lists(st.integers(0, 9), max_size=10, unique=True).map(sorted)


@given(
    blocks=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    calls=st.lists(st.integers(1, 5), min_size=1, max_size=6),
)
def test_a_sweep_brings_each_block_once_however_many_share_it(blocks: list[int], calls: list[int]) -> None:
    """Members that do the same, for different numbers of calls; a block that is used again later is brought again."""
    play = Play().run([[(0, blocks)] * count for count in calls])
    assert play.used == {member: blocks * count for member, count in enumerate(calls)}
    changes = [block for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    assert play.brought == [Counter(changes)] * max(calls)
    assert play.turnstile.ended == max(calls)


@given(
    programs=st.lists(
        st.lists(st.tuples(st.sampled_from([0, 1]), sorted_blocks) | st.just(REST), max_size=6), max_size=5
    )
)
def test_members_that_differ_all_end_and_still_share(programs: list[list[Call | str]]) -> None:
    """Each skips what it likes, as experts are skipped; in the order of definition nothing is brought twice."""
    play = Play().run(programs)
    for member, program in enumerate(programs):
        assert play.used[member] == [block for step in program if step != REST for block in step[1]]
    assert all(count == 1 for sweep in play.brought for count in sweep.values())
    begun = [event for event in play.log if event[0] in ("begin", "end")]
    assert [kind for kind, _ in begun] == ["begin", "end"] * (len(begun) // 2)


@given(
    programs=st.lists(
        st.lists(
            st.tuples(st.just(0), st.lists(st.integers(0, 5), max_size=5)) | st.sampled_from([REST, FAIL]), max_size=6
        ),
        max_size=5,
    )
)
def test_nobody_waits_for_ever_in_any_order_or_after_a_failure(programs: list[list[Call | str]]) -> None:
    play = Play().run(programs)
    if not any(FAIL in program for program in programs):
        for member, program in enumerate(programs):
            assert play.used[member] == [block for step in program if step != REST for block in step[1]]


@pytest.mark.parametrize("nested", [True, False])
def test_what_a_call_still_uses_is_not_let_go(nested: bool) -> None:
    turnstile = Turnstile()
    turnstile.join(0)
    turnstile.arrive(0, 0)
    assert turnstile.turn(0).begins
    assert not turnstile.wants(0, 1)
    assert turnstile.turn(0).member == 0
    turnstile.shares(1)
    turnstile.uses(0, 1)
    if not nested:
        turnstile.used(0, 1)
    assert not turnstile.wants(0, 2)
    assert turnstile.turn(0).release == (() if nested else (1,))
