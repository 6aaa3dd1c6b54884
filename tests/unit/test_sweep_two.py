"""Threads that share a sweep on two processors: one on the device, one on the CPU, and any of them may fail or stop."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sweep import FakeExecutor

from penstock.memory.errors import DiskError
from penstock.runtime.guess import Root
from penstock.runtime.sweep import StoppedError, Sweep

How = Literal["device", "cpu", "part"]
NBYTES = dict.fromkeys(range(20), 10)


class NotesRoots(FakeExecutor):
    def __init__(self) -> None:
        super().__init__()
        self.roots: list[Hashable] = []

    def begin(self, root: Hashable) -> None:
        self.roots.append(root)
        super().begin(root)


def sweep_of(executor: FakeExecutor, members: int) -> Sweep:
    return Sweep(
        executor,  # type: ignore[arg-type]
        members=range(members),
        resident=lambda block: block >= 100,
        computed=lambda: None,
        on_cpu=frozenset(range(20)),
        nbytes=NBYTES,
    )


class Processor:
    """Insists that only one thread is inside at a time."""

    def __init__(self) -> None:
        self._busy = threading.Lock()

    def compute(self, seconds: float) -> None:
        assert self._busy.acquire(blocking=False), "two at once"
        time.sleep(seconds)
        self._busy.release()


def play(
    sweep: Sweep, programs: Sequence[Sequence[tuple[How, int]]], *, calls: int = 2, odd: int = -1, seed: int = 0
) -> list[BaseException | None]:
    """Run all members in threads; `odd` raises in the last step of its last call. What each ended with."""
    ends: list[BaseException | None] = [None] * len(programs)
    device, cpu = Processor(), Processor()
    draw = random.Random(seed)
    waits = [draw.choice([0, 0, 1e-4, 1e-3]) for _ in range(100)]

    def step(member: int, how: How, block: int, fails: bool) -> None:
        seconds = waits[(member * 31 + block * 7) % 100]
        if how == "cpu":
            with sweep.away(block, (block,)):
                cpu.compute(seconds)
                if fails:
                    raise ValueError("odd")
            return
        if how == "part":
            with sweep.inside(block, (block,)):
                step(member, "device", block, fails)
            return
        lease = sweep.acquire(block)
        try:
            device.compute(seconds)
            if fails:
                raise ValueError("odd")
        finally:
            sweep.release(lease)

    def work(member: int) -> None:
        try:
            with sweep.taking_part(member):
                for number in range(calls):
                    under = 3 if all(how != "part" for how, _ in programs[member]) else None
                    sweep.begin(0 if under is None else Root(0, under))
                    failed = True
                    try:
                        for place, (how, block) in enumerate(programs[member]):
                            last = number == calls - 1 and place == len(programs[member]) - 1
                            step(member, how, block, last and member == odd)
                        failed = False
                    finally:
                        sweep.end(failed=failed)
        except BaseException as error:
            ends[member] = error

    threads = [threading.Thread(target=work, args=(member,)) for member in range(len(programs))]
    for thread in threads:
        thread.start()
    sweep.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive(), "a member waits for ever"
    return ends


TOKENS: list[tuple[How, int]] = [("device", 1), ("cpu", 2), ("device", 3), ("device", 100), ("cpu", 4), ("device", 5)]
PROMPT: list[tuple[How, int]] = [(("part" if how == "cpu" else how), block) for how, block in TOKENS]


@settings(max_examples=40)
@given(members=st.integers(1, 5), seed=st.integers(0, 1000))
def test_the_order_is_the_same_however_long_anything_takes(members: int, seed: int) -> None:
    executor = FakeExecutor()
    sweep = sweep_of(executor, members)
    assert play(sweep, [TOKENS] * members, calls=3, seed=seed) == [None] * members
    assert executor.orders == [[1, 3, 100, 5]] * 3
    assert executor.acquired == [Counter({1: 1, 3: 1, 5: 1, 100: members})] * 3
    assert not +executor.held
    assert sweep.cpu_share == pytest.approx(2 / 5)


@settings(max_examples=40)
@given(seed=st.integers(0, 1000))
def test_a_prompt_beside_tokens_is_the_order_of_the_sweep(seed: int) -> None:
    executor = NotesRoots()
    assert play(sweep_of(executor, 3), [TOKENS, PROMPT, TOKENS], seed=seed) == [None] * 3
    assert [sorted(order) for order in executor.orders] == [[1, 2, 3, 4, 5, 100]] * 2
    assert executor.acquired == [Counter({1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 100: 3})] * 2
    assert executor.roots == [0, 0], "the broadest call names the sweep"


def test_a_sweep_of_tokens_has_a_root_of_its_own() -> None:
    executor = NotesRoots()
    play(sweep_of(executor, 2), [TOKENS] * 2, calls=1)
    assert executor.roots == [Root(0, 3)]


@settings(max_examples=60)
@given(members=st.integers(1, 5), odd=st.integers(0, 4), seed=st.integers(0, 1000))
def test_all_end_where_one_fails_on_either_processor(members: int, odd: int, seed: int) -> None:
    odd %= members
    draw = random.Random(seed)
    how: list[How] = ["device", "cpu", "part"]
    programs = [[(draw.choice(how), draw.randrange(6)) for _ in range(4)] for _ in range(members)]
    executor = FakeExecutor()
    ends = play(sweep_of(executor, members), programs, odd=odd, seed=seed)
    assert isinstance(ends[odd], ValueError)
    for member, end in enumerate(ends):
        assert member == odd or end is None or isinstance(end, StoppedError)
    assert not +executor.held, "a lease was kept"
    assert not executor._open


@pytest.mark.parametrize("seed", range(4))
def test_who_gives_a_processor_back_hands_it_on_at_once(seed: int) -> None:
    """Others that look in between would take it for one that waits, and give it two turns."""
    sweep = sweep_of(FakeExecutor(), 3)
    hand_on = sweep._hand_on

    def slowly(member: int | None) -> bool:
        time.sleep(1e-3)
        return hand_on(member)

    sweep._hand_on = slowly  # type: ignore[method-assign]
    assert play(sweep, [TOKENS] * 3, calls=3, seed=seed) == [None] * 3


def test_a_block_that_cannot_be_brought_fails_the_one_who_wants_it() -> None:
    executor = FakeExecutor(fails_at=3)
    ends = play(sweep_of(executor, 4), [TOKENS] * 4)
    assert sum(isinstance(end, DiskError) for end in ends) == 1
    assert sum(isinstance(end, StoppedError) for end in ends) == 3
    assert not +executor.held


@pytest.mark.parametrize("others", [0, 2])
def test_stopped_while_one_computes_on_the_cpu(others: int) -> None:
    """It ends the part first; those that wait for the CPU or the device end at once, each in its turn."""
    executor = FakeExecutor()
    sweep = sweep_of(executor, 1 + others)
    there, go_on = threading.Event(), threading.Event()
    ends: list[BaseException] = []

    def work(member: int) -> None:
        try:
            with sweep.taking_part(member):
                sweep.begin(Root(0, 3))
                try:
                    with sweep.away(1, (1,)):
                        there.set()
                        assert go_on.wait(30)
                finally:
                    sweep.end(failed=True)
        except StoppedError as error:
            ends.append(error)

    threads = [threading.Thread(target=work, args=(member,)) for member in range(1 + others)]
    for thread in threads:
        thread.start()
    sweep.start()
    assert there.wait(30)
    sweep.stop()
    go_on.set()
    for thread in threads:
        thread.join(timeout=30)
    assert len(ends) == 1 + others
    assert not executor._open
