"""Threads that share a sweep: one runs at a time, a block is leased once, and any of them may fail."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Hashable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.memory.errors import DiskError
from penstock.runtime.sweep import StoppedError, Sweep


class Held:
    """A lease, as far as a sweep looks at it."""

    def __init__(self, block: int) -> None:
        self.block = block


class FakeExecutor:
    """Counts, and insists that only one thread is inside at a time."""

    def __init__(self, *, fails_at: int = -1) -> None:
        self.held: Counter[int] = Counter()
        self.orders: list[list[int]] = []
        self.acquired: list[Counter[int]] = []
        self.failures = 0
        self._fails_at = fails_at
        self._open = False
        self._busy = threading.Lock()

    def begin(self, root: Hashable) -> None:
        assert not self._open
        self._open = True
        self.orders.append([])
        self.acquired.append(Counter())

    def end(self, *, failed: bool) -> None:
        assert self._open
        self._open = False
        self.failures += failed

    def acquire(self, block: int, *, observed: bool = True) -> Any:
        assert self._busy.acquire(blocking=False), "two threads at once"
        try:
            if block == self._fails_at:
                raise DiskError("the drive is gone")
            if observed:
                self.orders[-1].append(block)
            self.acquired[-1][block] += 1
            self.held[block] += 1
            return Held(block)
        finally:
            self._busy.release()

    def release(self, lease: Any, event: object = None) -> None:
        self.held[lease.block] -= 1
        assert self.held[lease.block] >= 0


def play(executor: FakeExecutor, members: int, calls: list[list[int]], *, odd: int = -1) -> list[BaseException | None]:
    """Run all members in threads; the member `odd` raises in the middle of its last call. What each ended with."""
    sweep = Sweep(executor, members=range(members), resident=lambda b: b >= 100, computed=lambda: None)  # type: ignore[arg-type]
    ends: list[BaseException | None] = [None] * members
    inside = threading.Lock()

    def work(member: int) -> None:
        try:
            with sweep.taking_part(member):
                for number, blocks in enumerate(calls):
                    sweep.begin(0)
                    failed = True
                    try:
                        for block in blocks:
                            lease = sweep.acquire(block)
                            try:
                                assert inside.acquire(blocking=False), "two compute at once"
                                inside.release()
                                if member == odd and number == len(calls) - 1:
                                    raise ValueError("odd")
                            finally:
                                sweep.release(lease)
                        failed = False
                    finally:
                        sweep.end(failed=failed)
        except BaseException as error:
            ends[member] = error

    threads = [threading.Thread(target=work, args=(member,)) for member in range(members)]
    for thread in threads:
        thread.start()
    sweep.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive(), "a member waits for ever"
    assert not +executor.held, "a lease was kept"
    return ends


@settings(max_examples=30)
@given(members=st.integers(1, 6), blocks=st.lists(st.integers(0, 6), min_size=1, max_size=6), calls=st.integers(1, 4))
def test_one_lease_per_block_and_sweep(members: int, blocks: list[int], calls: int) -> None:
    executor = FakeExecutor()
    assert play(executor, members, [blocks] * calls) == [None] * members
    brought = [block for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    assert executor.acquired == [Counter(brought)] * calls
    assert executor.orders == [brought] * calls


def test_resident_blocks_are_leased_by_each_and_observed_once() -> None:
    executor = FakeExecutor()
    play(executor, 3, [[1, 100, 2, 101, 3]])
    assert executor.orders == [[1, 100, 2, 101, 3]]
    assert executor.acquired == [Counter({1: 1, 2: 1, 3: 1, 100: 3, 101: 3})]


@settings(max_examples=30)
@given(members=st.integers(1, 6), odd=st.integers(0, 5), seed=st.integers(0, 1000))
def test_all_end_where_one_fails(members: int, odd: int, seed: int) -> None:
    odd %= members
    draw = random.Random(seed)
    calls = [[draw.randrange(8) for _ in range(4)] for _ in range(3)]
    executor = FakeExecutor()
    ends = play(executor, members, calls, odd=odd)
    assert isinstance(ends[odd], ValueError)
    for member, end in enumerate(ends):
        assert member == odd or end is None or isinstance(end, StoppedError)
    assert executor.failures == 1
    assert not executor._open


def test_a_block_that_cannot_be_brought_fails_the_one_who_wants_it() -> None:
    executor = FakeExecutor(fails_at=2)
    ends = play(executor, 4, [[1, 2, 3]])
    assert sum(isinstance(end, DiskError) for end in ends) == 1
    assert sum(isinstance(end, StoppedError) for end in ends) == 3


def test_stopped_from_outside() -> None:
    executor = FakeExecutor()
    sweep = Sweep(executor, members=range(2), resident=lambda b: False, computed=lambda: None)  # type: ignore[arg-type]
    ends: list[BaseException] = []

    def work(member: int) -> None:
        try:
            with sweep.taking_part(member):
                while True:
                    sweep.begin(0)
                    try:
                        sweep.release(sweep.acquire(1))
                    finally:
                        sweep.end(failed=False)
        except StoppedError as error:
            ends.append(error)

    threads = [threading.Thread(target=work, args=(member,)) for member in range(2)]
    for thread in threads:
        thread.start()
    sweep.start()
    while sweep.ended < 5:
        pass
    sweep.stop()
    for thread in threads:
        thread.join(timeout=30)
    assert len(ends) == 2


def test_a_member_that_never_came_is_not_waited_for() -> None:
    executor = FakeExecutor()
    sweep = Sweep(executor, members=range(2), resident=lambda b: False, computed=lambda: None)  # type: ignore[arg-type]
    sweep.withdraw(0)
    sweep.start()
    with sweep.taking_part(1):
        sweep.begin(0)
        sweep.release(sweep.acquire(1))
        sweep.end(failed=False)
    assert sweep.ended == 1
    with pytest.raises(KeyError):
        sweep.rest()
