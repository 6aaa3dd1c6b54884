"""Gradients that leave a device apart: what arrives is what was made, whatever is computed into its memory next."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.arena import PAGE, HostArena
from penstock.memory.errors import DiskError, StallError
from penstock.runtime.devices.emulated import EmulatedDevice, Rates
from penstock.runtime.training.departures import ByteRing, Departures

COUNT = 3000
"""Elements of a gradient: a little over a page of bf16."""


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    made = EmulatedDevice(Rates(d2h=64 * 2**20))
    yield made
    made.close()


def gradient(number: int, count: int = COUNT) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(number)).to(torch.bfloat16)


def at(arena: HostArena, offset: int) -> torch.Tensor:
    return torch.frombuffer(arena.view(offset, 2 * COUNT), dtype=torch.bfloat16)


def test_what_stays_is_what_was_sent(device: EmulatedDevice) -> None:
    arena = device.host_arena(8 * 2 * PAGE)
    leaving = Departures(device, ring_nbytes=0, held_nbytes=3 * 2 * COUNT)
    try:
        for index in range(8):
            leaving.send(index, gradient(index), at(arena, 2 * PAGE * index))  # nobody else holds it
        leaving.wait(3)
        leaving.settle()
        for index in range(8):
            assert torch.equal(at(arena, 2 * PAGE * index), gradient(index))
    finally:
        leaving.close()
        arena.close()


def test_memory_of_the_device_is_let_go_only_behind_its_copy(device: EmulatedDevice) -> None:
    """More than so much is never held, and what is let go has been waited for by the stream that computes."""
    waited: list[object] = []
    waits = device.compute_waits
    device.compute_waits = lambda event: (waited.append(event), waits(event))[1]  # type: ignore[method-assign]
    arena = device.host_arena(16 * PAGE)
    leaving = Departures(device, ring_nbytes=0, held_nbytes=2 * 2 * COUNT)
    try:
        sent: list[object] = []
        for index in range(6):
            leaving.send(index, gradient(index), at(arena, 0))
            sent.append(leaving._held[-1][1])
            assert sum(flat.nbytes for flat, _ in leaving._held) <= 2 * 2 * COUNT
            assert waited == sent[: max(0, index - 1)]
    finally:
        leaving.close()
        arena.close()


def test_through_the_ring_in_order_and_from_one_thread(device: EmulatedDevice) -> None:
    leaving = Departures(device, ring_nbytes=2 * 2 * PAGE)  # room for two
    seen: list[tuple[int, torch.Tensor]] = []
    threads: set[int] = set()
    try:
        for index in range(9):

            def work(host: torch.Tensor, index: int = index) -> None:
                threads.add(threading.get_ident())
                seen.append((index, host.clone()))

            leaving.through(index, gradient(index, COUNT - 100 * index), work)
        leaving.settle()
        assert [index for index, _ in seen] == list(range(9))
        assert all(torch.equal(found, gradient(index, COUNT - 100 * index)) for index, found in seen)
        assert len(threads) == 1
        assert threads != {threading.get_ident()}
    finally:
        leaving.close()


def test_what_is_to_be_done_with_one_that_was_sent_comes_behind_its_arrival(device: EmulatedDevice) -> None:
    arena = device.host_arena(2 * PAGE)
    leaving = Departures(device, ring_nbytes=0)
    seen: list[torch.Tensor] = []
    try:
        leaving.send(0, gradient(0), at(arena, 0))
        leaving.then(0, lambda: seen.append(at(arena, 0).clone()))
        leaving.wait(0)
        assert torch.equal(seen[0], gradient(0))
    finally:
        leaving.close()
        arena.close()


def test_what_fails_is_told_until_it_is_forgotten(device: EmulatedDevice) -> None:
    leaving = Departures(device, ring_nbytes=2 * PAGE)

    def fail(_: torch.Tensor) -> None:
        raise DiskError("full")

    done: list[int] = []
    try:
        leaving.through(0, gradient(0), fail)
        with pytest.raises(DiskError, match="full"):
            leaving.wait(0)
        with pytest.raises(DiskError, match="full"):
            leaving.through(1, gradient(1), lambda _: done.append(1))
        with pytest.raises(DiskError, match="full"):
            leaving.settle()
        with pytest.raises(DiskError, match="full"):
            leaving.wait(1)  # nobody takes what was given up for what is there
        assert not done
        leaving.forget()
        leaving.through(1, gradient(1), lambda _: done.append(1))
        leaving.settle()
        assert done == [1]
    finally:
        leaving.close()


def test_a_copy_that_cannot_begin_leaves_its_place_to_the_next_one(
    device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving = Departures(device, ring_nbytes=2 * 2 * PAGE, watch_s=0.05, stall_s=2.0)
    found: list[torch.Tensor] = []
    try:
        for number in range(8):
            if number % 2:
                with monkeypatch.context() as broken:
                    broken.setattr(device, "send", lambda *_: 1 / 0)
                    with pytest.raises(ZeroDivisionError):
                        leaving.through(number, gradient(number), found.append)
                continue
            leaving.through(number, gradient(number), lambda values: found.append(values.clone()))
        leaving.settle()
        assert [int(torch.equal(values, gradient(2 * place))) for place, values in enumerate(found)] == [1] * 4
    finally:
        leaving.close()


def test_a_wait_that_nothing_ends_is_given_up(device: EmulatedDevice) -> None:
    leaving = Departures(device, ring_nbytes=2 * PAGE, names=("first", "second"), watch_s=0.02, stall_s=0.06)
    go_on = threading.Event()
    try:
        leaving.through(0, gradient(0), lambda _: go_on.wait(20) and None)
        with pytest.raises(StallError, match="gradient of second waits for room; 1 gradients are on their way"):
            leaving.through(1, gradient(1), lambda _: None)
        with pytest.raises(StallError, match="gradient of first is waited for"):
            leaving.settle()
    finally:
        go_on.set()
        leaving.close()


@given(st.integers(1, 40), st.lists(st.integers(1, 40), max_size=30), st.data())
def test_pieces_of_a_ring_never_overlap(size: int, wanted: list[int], data: st.DataObject) -> None:
    """And one that would fit, were the ring empty, fits once enough has been given back."""
    ring = ByteRing(size)
    taken: deque[tuple[int, int]] = deque()
    for nbytes in wanted:
        nbytes = min(nbytes, size)
        while (start := ring.take(nbytes, timeout_s=0.0)) is None:
            assert taken, "an empty ring has room"
            ring.give_back()
            taken.popleft()
        assert 0 <= start <= start + nbytes <= size
        assert all(start + nbytes <= first or last <= start for first, last in taken)
        taken.append((start, start + nbytes))
        if taken and data.draw(st.booleans()):
            ring.give_back()
            taken.popleft()
