"""The executor with real threads: leases from many threads, interrupted waits, the watchdog, the end."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from penstock.memory.arena import PAGE, AnyArena, Slot
from penstock.memory.errors import ClosedError, StallError
from penstock.scheduler.core import Core
from penstock.scheduler.executor import Executor
from penstock.scheduler.order import AccessOrders
from penstock.scheduler.residence import Tier
from penstock.scheduler.timeline import Timeline

WAIT_S = 20.0


class InstantMover:
    """Reads at once, except blocks that never arrive."""

    def __init__(self, stuck: frozenset[int] = frozenset(), *, moving: bool = False) -> None:
        self.stuck = stuck
        self.moving = moving
        self.reads: list[int] = []

    async def read(self, block: int, slot: Slot, *, urgent: bool, on_data: Callable[[int, int], None]) -> None:
        self.reads.append(block)
        if block in self.stuck:
            await asyncio.get_running_loop().create_future()
        on_data(0, slot.nbytes)

    def before_copy(self, target: Slot) -> None:
        raise NotImplementedError

    def copy(self, block: int, source: Slot, target: Slot, start: int, stop: int) -> None:
        raise NotImplementedError

    def copied(self) -> object:
        raise NotImplementedError

    async def wait(self, event: object) -> None:
        pass

    def poison(self, slot: Slot) -> None:
        pass

    def progress(self) -> int:
        return time.monotonic_ns() if self.moving else 0


def make(
    mover: InstantMover, *, blocks: int = 8, ring: int = 3, watch_s: float = 10.0, stall_s: float = 60.0
) -> Executor:
    arena = AnyArena(tier="host", nbytes=ring * PAGE)
    core = Core(
        front=Tier(name="host", permanent={}, ring=[arena.cut(PAGE) for _ in range(ring)], sizes={}),
        back=None,
        nbytes=dict.fromkeys(range(blocks), PAGE),
        mover=mover,
        orders=AccessOrders(lambda root: tuple(range(blocks)), first="root"),
        clock=time.monotonic_ns,
        timeline=Timeline(),
        inflight_nbytes=1 << 30,
    )
    executor = Executor(core, mover, watch_s=watch_s, stall_s=stall_s)
    executor.start()
    return executor


def executor_threads() -> int:
    return sum(thread.name == "penstock-executor" for thread in threading.enumerate())


def test_sweeps() -> None:
    mover = InstantMover()
    executor = make(mover)
    for _ in range(5):
        executor.begin("root")
        for block in range(8):
            lease = executor.acquire(block)
            assert lease.block == block
            lease.residence.slot.check_stamp(block)
            executor.release(lease)
        executor.end(failed=False)
    assert executor.statistics().acquires == 40
    assert executor.statistics().orders.mismatched == 0
    executor.close()


def test_leases_from_many_threads() -> None:
    executor = make(InstantMover(), blocks=4, ring=9)
    held = executor.acquire(0)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(150):
                block = (seed * 7 + step * 3) % 4
                lease = executor.acquire(block, observed=False)
                lease.residence.slot.check_stamp(block)
                executor.release(lease)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not failures
    assert held.residence.leases == 1
    executor.release(held)
    assert all(not residence.leases for residence in executor.core.front.holding.values())
    assert executor.statistics().acquires == 8 * 150 + 1
    executor.close()


class Interrupted(Future[Any]):
    """A future whose first wait is interrupted, as by Ctrl-C."""

    late = False
    signalled = False

    def result(self, timeout: float | None = None) -> Any:
        if self.signalled:
            return super().result(timeout)
        if self.late:  # the grant came, and then the signal
            super().result(WAIT_S)
        self.signalled = True
        raise KeyboardInterrupt


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupted_wait_leaks_nothing(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = make(InstantMover(stuck=frozenset() if late else frozenset({5})))
    original = executor.core.acquire_nowait

    def interrupted(block: int, **how: bool) -> Any:
        got = original(block, **how)
        if not hasattr(got, "granted"):
            pytest.skip("the block was there already")
        got.granted.__class__ = Interrupted
        got.granted.late = late
        return got

    monkeypatch.setattr(executor.core, "acquire_nowait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        executor.acquire(5)
    monkeypatch.undo()
    with executor.core.lock:
        assert not executor.core._wishes.waiting
        assert all(not held.leases for held in executor.core.front.holding.values())
    executor.release(executor.acquire(1))
    executor.close()


def test_the_watchdog_gives_up_and_says_who_waits_for_what(caplog: pytest.LogCaptureFixture) -> None:
    executor = make(InstantMover(stuck=frozenset({6})), watch_s=0.01, stall_s=0.05)
    with caplog.at_level(logging.WARNING), pytest.raises(StallError) as caught:
        executor.acquire(6)
    message = str(caught.value)
    assert "block 6" in message
    assert "on the way: host:6" in message
    assert "\n" not in message
    assert 4 <= sum("waiting for block 6" in line for line in caplog.messages) <= 6
    assert not executor.core._wishes.waiting
    executor.release(executor.acquire(0))  # the others still work
    executor.close()


def test_the_watchdog_waits_as_long_as_bytes_move() -> None:
    executor = make(InstantMover(stuck=frozenset({6}), moving=True), watch_s=0.01, stall_s=0.03)
    caught: list[BaseException] = []

    def work() -> None:
        try:
            executor.acquire(6)
        except BaseException as error:
            caught.append(error)

    waiter = threading.Thread(target=work)
    waiter.start()
    waiter.join(0.3)
    assert waiter.is_alive()
    executor.close()
    waiter.join(WAIT_S)
    assert isinstance(caught[0], ClosedError)


def test_close_tells_waiters_and_stops_the_thread() -> None:
    executor = make(InstantMover(stuck=frozenset({6})))
    caught: list[BaseException] = []
    started = threading.Event()

    def work() -> None:
        started.set()
        try:
            executor.acquire(6)
        except BaseException as error:
            caught.append(error)

    waiters = [threading.Thread(target=work) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    started.wait(WAIT_S)
    time.sleep(0.02)
    executor.close()
    executor.close()
    for waiter in waiters:
        waiter.join(WAIT_S)
    assert [type(error) for error in caught] == [ClosedError] * 3
    assert executor_threads() == 0
    with pytest.raises(ClosedError):
        executor.acquire(0)
    executor.begin("root")  # late calls of a dying model are harmless
    executor.end(failed=True)


def test_a_lease_may_be_released_after_the_close() -> None:
    executor = make(InstantMover())
    lease = executor.acquire(0)
    executor.close()
    executor.release(lease)


def test_an_executor_that_never_started_can_be_closed() -> None:
    arena = AnyArena(tier="host", nbytes=PAGE)
    mover = InstantMover()
    core = Core(
        front=Tier(name="host", permanent={}, ring=[arena.cut(PAGE)], sizes={}),
        back=None,
        nbytes={0: PAGE},
        mover=mover,
        orders=AccessOrders(lambda root: (0,)),
        clock=time.monotonic_ns,
        timeline=Timeline(),
        inflight_nbytes=1,
    )
    executor = Executor(core, mover)
    executor.close()
    executor.close()


def test_any_failure_of_a_read_reaches_its_consumer() -> None:
    class BrokenMover(InstantMover):
        async def read(self, block: int, slot: Slot, *, urgent: bool, on_data: Callable[[int, int], None]) -> None:
            raise ZeroDivisionError("in the mover")

    executor = make(BrokenMover())
    with pytest.raises(ZeroDivisionError):
        executor.acquire(0)
    executor.close()
