"""The link probe against links whose rates are known."""

from __future__ import annotations

import pytest
from fakeclock import FakeClock

from penstock.memory.arena import AnyArena, HostArena
from penstock.runtime.calibration.link import measure_link
from penstock.runtime.devices.emulated import EmulatedDevice, Rates

MIB = 2**20
H2D, D2H, START = 20e9, 10e9, 10e-6


class FakeDevice(EmulatedDevice):
    """Copies take time by a clock of their own, and move nothing.

    Args:
        clock: Of everything.
        lanes: 2 is a way for each direction, 1 one for both.
    """

    def __init__(self, clock: FakeClock, lanes: int = 2) -> None:
        super().__init__(Rates())
        self.clock, self.lanes = clock, lanes
        self.free_at = [0.0, 0.0]
        self.copied_nbytes = 0

    def _take(self, lane: int, seconds: float) -> None:
        self.free_at[lane % self.lanes] = max(self.clock(), self.free_at[lane % self.lanes]) + seconds

    def copy(self, source: HostArena, start: int, target: AnyArena, offset: int, nbytes: int) -> None:
        assert start + nbytes <= source.nbytes
        assert offset + nbytes <= target.nbytes
        self.copied_nbytes += nbytes
        self._take(0, START + nbytes / H2D)

    def copy_back(self, source: AnyArena, start: int, target: HostArena, offset: int, nbytes: int) -> None:
        self._take(1, START + nbytes / D2H)

    def copied(self) -> object:
        return self.free_at[0]

    def copied_back(self) -> object:
        return self.free_at[1 % self.lanes]

    def wait(self, event: object) -> None:
        assert isinstance(event, float)
        self.clock.now = max(self.clock.now, event)


@pytest.mark.parametrize(("lanes", "duplex"), [(2, 1.0), (1, 0.5)])
def test_a_link_is_what_it_is(lanes: int, duplex: float) -> None:
    clock = FakeClock()
    device = FakeDevice(clock, lanes)
    try:
        link = measure_link(device, nbytes=8 * MIB, seconds=1.0, clock=clock, sizes=(MIB, 4 * MIB, 64 * MIB))
    finally:
        device.close()
    assert link.h2d.x == link.d2h.x == (MIB, 4 * MIB)  # the arenas hold no more
    assert link.h2d.y == pytest.approx([size / (START + size / H2D) for size in link.h2d.x])
    assert link.d2h.y == pytest.approx([size / (START + size / D2H) for size in link.h2d.x])
    assert max(link.h2d.spread) == pytest.approx(0, abs=1e-6)
    assert link.latency_s == pytest.approx(START + 4096 / H2D)
    assert link.duplex == pytest.approx(duplex, rel=0.15)  # small copies, whose starts count, and whole ones of them
    assert link.h2d_pageable is None


def test_a_slow_link_is_not_measured_with_large_copies() -> None:
    clock = FakeClock()

    class Slow(FakeDevice):
        def _take(self, lane: int, seconds: float) -> None:
            super()._take(lane, seconds * 1000)

    device = Slow(clock)
    try:
        link = measure_link(device, nbytes=64 * MIB, seconds=0.1, clock=clock, sizes=(MIB, 8 * MIB, 32 * MIB))
    finally:
        device.close()
    assert link.h2d.x == (MIB, 8 * MIB)
    assert link.d2h.x == (MIB, 8 * MIB)


def test_an_emulated_link_is_never_faster_than_it_is_told() -> None:
    device = EmulatedDevice(Rates(h2d=4e9, d2h=2e9))
    try:
        link = measure_link(device, nbytes=8 * MIB, seconds=0.2, sizes=(MIB, 4 * MIB))
    finally:
        device.close()
    # A loaded machine may be as slow as it likes; a bucket may give what it owed for some milliseconds.
    assert link.h2d.best <= 4e9 * 1.3
    assert link.d2h.best <= 2e9 * 1.3
