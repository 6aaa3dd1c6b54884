"""The emulated device: streams in order, events, waits between them, and rates on an injected clock."""

import threading
from collections.abc import Iterator

import pytest
import torch

from penstock.memory.arena import PAGE, POISON, HostArena
from penstock.memory.throttle import Throttle
from penstock.runtime.devices.base import Device
from penstock.runtime.devices.cpu import CpuDevice
from penstock.runtime.devices.emulated import PIECE, EmulatedDevice, Rates

WAIT_S = 20.0


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    made = EmulatedDevice(Rates())
    yield made
    made.close()


@pytest.fixture
def host() -> Iterator[HostArena]:
    made = HostArena(4 * PAGE)
    yield made
    made.close()


@pytest.fixture
def target(device: EmulatedDevice) -> Iterator[HostArena]:
    made = device.device_arena(4 * PAGE)
    assert isinstance(made, HostArena)
    yield made
    made.close()


def done(event: object) -> bool:
    assert isinstance(event, threading.Event)
    return event.is_set()


def test_copies_there_and_back(device: EmulatedDevice, host: HostArena, target: HostArena) -> None:
    host.view(5, 100)[:] = bytes(range(100))
    device.copy(host, 5, target, 77, 100)
    device.wait(device.copied())
    assert bytes(target.view(77, 100)) == bytes(range(100))
    assert bytes(target.view(0, 77)) == bytes(77)
    device.copy_back(target, 77, host, PAGE + 1, 100)
    device.wait(device.copied_back())
    assert bytes(host.view(PAGE + 1, 100)) == bytes(range(100))
    assert target.tier == "device"
    assert int(device.tensor(target)[78]) == 1


def test_a_stream_keeps_its_order_and_events_mark_it(
    device: EmulatedDevice, host: HostArena, target: HostArena
) -> None:
    gate = threading.Event()
    before = device.copied()
    device.copies_wait(gate)
    host.view(0, 1)[:] = b"a"
    device.copy(host, 0, target, 0, 1)
    middle = device.copied()
    device.copy(target, 0, target, 1, 1)  # reads what the first one wrote
    device.poison(target, 0, 1)
    after = device.copied()
    device.wait(before)
    assert not done(middle)
    assert not done(after)
    assert bytes(target.view(0, 2)) == bytes(2)
    host.view(0, 1)[:] = b"b"  # copies are asynchronous: they take what is there when their turn comes
    gate.set()
    device.wait(after)
    assert done(middle)
    assert bytes(target.view(0, 2)) == bytes([POISON]) + b"b"


def test_the_directions_are_independent(device: EmulatedDevice, host: HostArena, target: HostArena) -> None:
    gate = threading.Event()
    device.copies_wait(gate)
    down, up = device.copied(), device.copied_back()
    device.wait(up)
    assert not done(down)
    gate.set()
    device.wait(down)


def test_events_that_passed_hold_nothing_up(device: EmulatedDevice) -> None:
    passed = threading.Event()
    passed.set()
    device.copies_wait(passed)
    device.copies_wait(None)
    device.wait(None)
    device.compute_waits(device.copied())
    assert device.computed() is None
    assert device.available_nbytes() is None


def test_host_memory_is_poisoned_at_once(device: EmulatedDevice, host: HostArena) -> None:
    gate = threading.Event()
    device.copies_wait(gate)
    device.poison(host, PAGE, PAGE)
    assert bytes(host.view(PAGE, PAGE)) == bytes([POISON]) * PAGE
    gate.set()


def test_close_carries_out_what_was_enqueued(host: HostArena) -> None:
    device = EmulatedDevice(Rates())
    target = device.device_arena(PAGE)
    assert isinstance(target, HostArena)
    host.view(0, 3)[:] = b"end"
    for _ in range(50):
        device.copy(host, 0, target, 0, 3)
    device.close()
    assert bytes(target.view(0, 3)) == b"end"
    target.close()


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_a_throttle_queues_transfers_and_saves_nothing_up() -> None:
    clock = Clock()
    throttle = Throttle(100.0, clock=lambda: clock.now, sleep=clock.sleep)
    assert throttle.reserve(50) == 1000.5
    assert throttle.reserve(100) == 1001.5  # behind the first
    throttle.wait_until(1001.5)
    throttle.wait_until(1000.5)  # passed
    assert clock.slept == [1.5]
    clock.now = 2000.0  # idle time is not saved up
    assert throttle.reserve(100) == 2001.0


def test_a_throttled_copy_takes_its_time_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    def throttle(rate: float) -> Throttle:
        return Throttle(rate, clock=lambda: clock.now, sleep=clock.sleep)

    monkeypatch.setattr("penstock.runtime.devices.emulated.Throttle", throttle)
    device = EmulatedDevice(Rates(h2d=float(PIECE), disk=7.0))
    size = 2 * PIECE + PIECE // 2
    host, target = device.host_arena(size), device.device_arena(size)
    device.copy(host, 0, target, 0, size)
    device.wait(device.copied())
    assert clock.slept == [1.0, 1.0, 0.5]
    device.copy_back(target, 0, host, 0, size)  # unlimited
    device.wait(device.copied_back())
    assert len(clock.slept) == 3
    assert device.disk_throttle is not None
    assert device.disk_throttle.rate == 7.0
    device.close()
    host.close()
    target.close()


def test_tensors_cross_after_what_they_wait_for(device: EmulatedDevice, host: HostArena) -> None:
    source = torch.arange(100, dtype=torch.uint8)
    whole = threading.Event()
    out = device.copy_out(source, host, 7, whole)
    assert not done(out)
    source += 1  # before the event: this is what is copied
    whole.set()
    device.wait(out)
    assert bytes(host.view(7, 100)) == bytes(range(1, 101))
    free, made = threading.Event(), torch.zeros(60, dtype=torch.uint8)
    back = device.copy_in(host, 10, made, free)
    assert not done(back)
    free.set()
    device.wait(back)
    assert torch.equal(made, torch.arange(4, 64, dtype=torch.uint8))


def test_on_the_cpu_tensors_are_copied_at_once() -> None:
    device = CpuDevice()
    arena = device.host_arena(PAGE)
    assert device.copy_out(torch.arange(9, dtype=torch.uint8), arena, 3, None) is None
    made = torch.zeros(4, dtype=torch.uint8)
    assert device.copy_in(arena, 5, made, None) is None
    assert made.tolist() == [2, 3, 4, 5]
    arena.close()


def test_the_cpu_has_one_tier() -> None:
    device: Device = CpuDevice()
    assert not device.separate
    assert device.copied() is device.computed() is device.copied_back() is None
    arena = device.host_arena(PAGE)
    device.poison(arena, 0, 4)
    assert torch.equal(device.tensor(arena)[:5], torch.tensor([255, 255, 255, 255, 0], dtype=torch.uint8))
    for impossible in (device.copy, device.copy_back):
        with pytest.raises(NotImplementedError):
            impossible(arena, 0, arena, 0, 1)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError):
        device.device_arena(PAGE)
    device.close()
    arena.close()
