"""Probes of processors, against operations whose times are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fakeclock import FakeClock

from penstock.memory.errors import PenstockError
from penstock.runtime.calibration import attention, products
from penstock.runtime.calibration.adam import adam_rate
from penstock.runtime.calibration.attention import POINTS, attention_curve
from penstock.runtime.calibration.devicememory import device_memory_rate
from penstock.runtime.calibration.dram import OPERATIONS, MemoryOperation, memory_rates
from penstock.runtime.calibration.launch import launch_cost
from penstock.runtime.calibration.products import Shape, linear_curve
from penstock.runtime.calibration.sharing import Counter, Shares, share
from penstock.runtime.calibration.timing import HostTimer, device_timer, host_timer

MIB = 2**20
CPU = torch.device("cpu")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_products_at_known_rates(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def rate(rows: int) -> float:
        return min(10e9, 80e9 / rows)

    def linear(x: torch.Tensor, weight: torch.Tensor) -> None:
        assert x.shape[0] == 1
        assert x.stride(0) == x.shape[1] * x.shape[2]  # as a tensor of its own has
        assert weight.is_contiguous()
        seen.append((weight.data_ptr(), weight.nbytes))
        clock.take(weight.nbytes / rate(x.shape[1]))

    monkeypatch.setattr(products.functional, "linear", linear)
    rows = (1, 8, 64, 512)
    found = linear_curve(
        CPU, torch.bfloat16, nbytes=8 * MIB, seconds=0.3, timer=HostTimer(clock), clock=clock, rows=rows,
        shape=Shape(outputs=512, inputs=1024),
    )  # fmt: skip
    assert found.x == rows
    assert found.y == pytest.approx([rate(each) for each in rows])
    assert len({address for address, _ in seen}) > 4  # always others, so that they come from memory
    assert max(nbytes for _, nbytes in seen) == MIB


def test_products_that_would_last_too_long_are_smaller(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(x: torch.Tensor, weight: torch.Tensor) -> None:
        longest.append(weight.nbytes / 1e7)
        clock.take(weight.nbytes / 1e7)

    longest: list[float] = []
    monkeypatch.setattr(products.functional, "linear", linear)
    found = linear_curve(
        CPU, torch.float32, nbytes=8 * MIB, seconds=0.3, timer=HostTimer(clock), clock=clock, rows=(4,),
        shape=Shape(outputs=2048, inputs=256),
    )  # fmt: skip
    assert found.y == pytest.approx([1e7])
    assert max(longest) <= products.LONGEST_S


def test_attention_at_known_rates(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, enable_gqa: bool) -> None:
        assert key.shape == value.shape
        assert key.is_contiguous()
        assert enable_gqa == (query.shape[1] > key.shape[1])
        rows = query.shape[2] * query.shape[1] // key.shape[1]
        clock.take(2 * key.nbytes / (4e9 / rows))

    monkeypatch.setattr(attention.functional, "scaled_dot_product_attention", attend)
    found = attention_curve(CPU, torch.float32, nbytes=16 * MIB, seconds=0.3, timer=HostTimer(clock), clock=clock)
    assert found.x == tuple(point.rows for point in POINTS)
    assert found.y == pytest.approx([4e9 / rows for rows in found.x])


def test_torch_itself_is_measured() -> None:
    timer = HostTimer()
    for dtype in (torch.float32, torch.bfloat16):
        linear = linear_curve(CPU, dtype, nbytes=MIB, seconds=0.01, timer=timer, rows=(1, 4))
        attend = attention_curve(CPU, dtype, nbytes=4 * MIB, seconds=0.01, timer=timer, points=POINTS[:2])
        assert len(linear.spread) == len(attend.spread) == 2
        assert min(*linear.y, *attend.y) > 0
    launched = launch_cost(CPU, seconds=0.01, timer=timer, calls=50)
    assert launched.operation.value > 0
    assert launched.module.value > 0
    assert device_memory_rate(CPU, nbytes=MIB, seconds=0.01, timer=timer).best > 0


class FakeOptimizer:
    def __init__(self, clock: FakeClock, elements: int, rate: float) -> None:
        self.step = lambda: clock.take(elements / rate)


def test_the_best_way_of_adam(clock: FakeClock) -> None:
    rates = {"fused": 2e9, "foreach": 5e8, "single": 9e9}
    tried = []

    def make(parameters: Sequence[torch.Tensor], way: str) -> Any:
        tried.append(way)
        assert all(parameter.grad is not None for parameter in parameters)
        return FakeOptimizer(clock, sum(p.numel() for p in parameters), rates[way])

    found = adam_rate(CPU, nbytes=MIB, seconds=0.1, timer=HostTimer(clock), clock=clock, make=make)
    assert (found.way, found.elements.value) == ("fused", pytest.approx(2e9))
    assert tried == ["fused", "foreach"]  # the last one is for those that have no other


def test_ways_of_adam_that_are_refused(clock: FakeClock) -> None:
    def make(parameters: Sequence[torch.Tensor], way: str) -> Any:
        if way != "single":
            raise RuntimeError(f"no {way} here")
        return FakeOptimizer(clock, sum(p.numel() for p in parameters), 1e8)

    timer = HostTimer(clock)
    found = adam_rate(CPU, nbytes=MIB, seconds=0.1, timer=timer, clock=clock, make=make)
    assert (found.way, found.elements.value) == ("single", pytest.approx(1e8))
    with pytest.raises(PenstockError, match="fused: no fused here"):
        adam_rate(CPU, nbytes=MIB, seconds=0.1, timer=timer, clock=clock, make=make, ways=("fused",))


class FixedTimer:
    def seconds(self, work: Callable[[], object]) -> float:
        work()
        return 0.002


def test_launches_are_counted() -> None:
    found = launch_cost(CPU, seconds=0.0, timer=FixedTimer(), clock=FakeClock(), calls=100)
    assert found.operation.value == found.module.value == pytest.approx(2e-5)


@pytest.mark.parametrize("threads", [(1,), (1, 2, 3)])
def test_memory_at_known_rates(clock: FakeClock, threads: tuple[int, ...]) -> None:
    def takes(rate: float) -> Callable[[int, int], None]:
        return lambda address, nbytes: clock.take(nbytes / rate)

    operations = {
        "copy": MemoryOperation(run=takes(4e9)),
        "read": MemoryOperation(run=takes(8e9)),
        "write": MemoryOperation(run=takes(2e9), traffic=2.0),
    }
    found = memory_rates(nbytes=3 * MIB, threads=threads, seconds=0.3, clock=clock, operations=operations)
    assert found.copy.x == threads
    # Threads that take turns are together as fast as one.
    assert found.copy.y == pytest.approx([4e9] * len(threads))
    assert found.read.y == pytest.approx([8e9] * len(threads))
    assert found.write.y == pytest.approx([4e9] * len(threads))


def test_libc_does_what_it_is_asked_for() -> None:
    found = memory_rates(nbytes=2 * MIB, threads=(1, 2), seconds=0.01)
    assert min(*found.copy.y, *found.read.y, *found.write.y) > 0
    buffer = bytearray(b"\1" * 8192)
    address = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
    buffer[4096:] = b"\3" * 4096
    OPERATIONS["copy"].run(address, 8192)
    assert buffer == b"\3" * 8192
    OPERATIONS["read"].run(address, 8192)
    OPERATIONS["write"].run(address, 8192)
    assert buffer == b"\1" * 8192


def test_shares_of_two_that_slow_each_other(clock: FakeClock) -> None:
    loaded = False
    started = 0.0

    @contextmanager
    def load() -> Iterator[Counter]:
        nonlocal loaded, started, moved
        loaded, started = True, clock()
        moved = 0.0
        yield lambda: int(moved)
        loaded = False

    moved = 0.0

    def pass_time(seconds: float, rate: float) -> None:
        nonlocal moved
        clock.take(seconds)
        moved += seconds * rate

    def compute() -> None:
        pass_time(0.02 if loaded else 0.01, 6e8)

    found = share(compute, load, seconds=0.9, clock=clock, sleep=lambda seconds: pass_time(seconds, 1e9))
    assert found == Shares(compute=pytest.approx(0.5), load=pytest.approx(0.6))


def test_timers_for_a_cpu(clock: FakeClock) -> None:
    assert HostTimer(clock).seconds(lambda: clock.take(0.25)) == 0.25
    assert isinstance(device_timer(CPU), HostTimer)
    assert isinstance(host_timer(CPU), HostTimer)
