"""Storages that leave memory and come back: the bytes, how often they move, and what a drive may do to them."""

from __future__ import annotations

import errno
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.memory.disk import DiskEngine
from penstock.memory.errors import ClosedError, CorruptBlockError, DiskError, StallError
from penstock.memory.regions import Regions
from penstock.runtime.activations.hold import HeldTensor, Hold, Where
from penstock.runtime.activations.store import ActivationStore
from penstock.runtime.activations.trail import Trail
from penstock.runtime.devices.cpu import CpuDevice
from penstock.runtime.devices.emulated import EmulatedDevice, Rates
from penstock.scheduler.activations import Part

BUFFER = 64 << 10


@pytest.fixture
def engine() -> Iterator[DiskEngine]:
    made = DiskEngine()
    yield made
    made.close()


@pytest.fixture(params=["cpu", "emulated"])
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = CpuDevice() if request.param == "cpu" else EmulatedDevice(Rates(h2d=2**31, d2h=2**31))
    yield made
    made.close()


@pytest.fixture
def make(tmp_path: Path, device: Any, engine: DiskEngine) -> Iterator[Callable[..., ActivationStore]]:
    stores: list[ActivationStore] = []

    def made(*, drives: int = 1, **options: Any) -> ActivationStore:
        options = {"host_nbytes": 1 << 20, "buffer_nbytes": BUFFER, "leaving_nbytes": 1 << 20, **options}
        paths = [str(tmp_path / f"activations{drive}.bin") for drive in range(drives)]
        store = ActivationStore(device=device, engine=engine, paths=paths, **options)
        stores.append(store)
        return store

    yield made
    for store in stores:
        store.stop()
    engine.close()  # writes into the buffers until then
    for store in stores:
        store.close()


def values(seed: int, elements: int = 30_000) -> torch.Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(seed))


def send(store: ActivationStore, tensor: torch.Tensor, *parts: tuple[Any, int]) -> Hold | None:
    """All of a storage to one place, or the first bytes to some and the rest to the last."""
    left = tensor.untyped_storage().nbytes()
    found = []
    for place, nbytes in parts:
        found.append(Part(place=place, nbytes=min(nbytes, left)))
        left -= found[-1].nbytes
    assert not left
    return store.send(tensor.untyped_storage(), found, label="layer 3")


ALL = 1 << 40


def back(store: ActivationStore, hold: Hold) -> torch.Tensor:
    return torch.empty(0).set_(store.storage_of(hold))  # type: ignore[call-overload, no-any-return]


def gone(hold: Hold) -> None:
    """Wait until a storage has left and its writes have landed."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with hold.store.changed:
            if hold.where is Where.AWAY and not hold.writes:
                return
        time.sleep(0.001)
    raise AssertionError(hold.where)


PLACES = [
    [("host", ALL)],
    [("disk", ALL)],
    [("keep", 8192), ("disk", ALL)],
    [("host", 4096), ("disk", ALL)],
    [("keep", 4096), ("host", 65536), ("disk", ALL)],
]


@pytest.mark.parametrize("parts", PLACES)
def test_what_comes_back_is_what_left(parts: list[Any], make: Callable[..., ActivationStore]) -> None:
    store = make(drives=2)
    expected = [values(seed, 20_000 + 11 * seed) for seed in range(8)]
    holds = []
    for value in expected:
        sent = value.clone()
        hold = send(store, sent, *parts)
        assert hold is not None
        holds.append(hold)
        del sent
    for hold in holds:
        gone(hold)
        assert hold.storage is None
    for hold in reversed(holds):
        store.bring(hold, ahead=True)
    for hold, value in zip(reversed(holds), reversed(expected), strict=True):
        assert torch.equal(back(store, hold), value)
        assert torch.equal(back(store, hold), value)  # it is there: it does not move again
    stats = store.statistics()
    moved = sum(value.nbytes for value in expected) - len(holds) * (parts[0][1] if parts[0][0] == "keep" else 0)
    assert stats.out_nbytes == stats.in_nbytes == moved
    assert (stats.sent, stats.returned, stats.on_demand) == (8, 8, 0)
    holds.clear()
    del hold
    gc.collect()
    stats = store.statistics()
    assert (stats.host_nbytes, stats.file_nbytes, stats.kept_nbytes) == (0, 0, 0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60_000), min_size=1, max_size=12),
    places=st.lists(st.sampled_from(PLACES), min_size=12, max_size=12),
    order=st.permutations(range(12)),
    drop=st.sets(st.integers(0, 11)),
)
def test_in_any_order_and_with_some_dropped_on_the_way(
    sizes: list[int], places: list[Any], order: list[int], drop: set[int], make: Callable[..., ActivationStore]
) -> None:
    store = make()
    holds: list[Hold | None] = []
    for seed, size in enumerate(sizes):
        holds.append(send(store, values(seed, size), *places[seed]))
    for index in drop & set(range(len(sizes))):
        holds[index] = None
    for index in order:
        hold = holds[index] if index < len(holds) else None
        if hold is not None:
            assert torch.equal(back(store, hold), values(index, sizes[index]))
    holds.clear()
    hold = None
    end = time.monotonic() + 10
    while time.monotonic() < end and (store.statistics().host_nbytes or store.statistics().file_nbytes):
        time.sleep(0.001)  # those that were dropped while they were leaving go with their last write
    stats = store.statistics()
    assert (stats.host_nbytes, stats.file_nbytes) == (0, 0)
    assert store.leaving_nbytes == 0


def test_who_asks_before_it_has_left_gets_it_as_it_is(make: Callable[..., ActivationStore], engine: DiskEngine) -> None:
    go_on = threading.Event()

    def hang(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        go_on.wait()
        return os.pwritev(fd, buffers, offset)

    engine.pwrite = hang
    store = make(leaving_nbytes=4 << 20)
    sent = [values(seed, 100_000) for seed in range(3)]  # more than the buffers hold
    holds = [send(store, each, ("disk", ALL)) for each in sent]
    for each, hold in zip(sent, holds, strict=True):
        assert hold is not None
        assert store.storage_of(hold).data_ptr() == each.data_ptr()
    go_on.set()
    assert store.statistics().in_nbytes == 0


def test_a_full_arena_refuses(make: Callable[..., ActivationStore]) -> None:
    store = make(host_nbytes=8192)
    first = send(store, values(0, 2000), ("host", ALL))
    assert first is not None
    assert send(store, values(1, 2000), ("host", ALL)) is None
    del first
    deadline = time.monotonic() + 60  # the thread that copied it out may not have let go of it yet
    while send(store, values(1, 2000), ("host", ALL)) is None:
        assert time.monotonic() < deadline
        gc.collect()


def test_what_stays_is_counted_and_bounded(make: Callable[..., ActivationStore]) -> None:
    store = make(keep_nbytes=10_000)
    hold = send(store, values(0, 2000), ("keep", ALL))
    assert hold is not None
    assert store.statistics().kept_nbytes == 8000
    assert send(store, values(1, 2000), ("keep", ALL)) is None
    assert torch.equal(back(store, hold), values(0, 2000))
    del hold
    gc.collect()
    assert send(store, values(1, 2000), ("keep", ALL)) is not None


def failing(number: int) -> Callable[..., int]:
    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "full"), (errno.EIO, "dmesg")])
def test_a_write_that_fails_is_told_once_and_the_store_goes_on(
    number: int, remedy: str, make: Callable[..., ActivationStore], engine: DiskEngine
) -> None:
    store = make()
    works, engine.pwrite = engine.pwrite, failing(number)
    hold = send(store, values(0), ("disk", ALL))
    assert hold is not None
    with hold.store.changed:
        assert store.changed.wait_for(lambda: hold.error is not None and hold.where is Where.AWAY, timeout=10)
    engine.pwrite = works
    match = rf"activation 1 of layer 3.*offset \d+ of .*activations0\.bin.*{remedy}"
    with pytest.raises(DiskError, match=match):
        send(store, values(1), ("disk", ALL))
    with pytest.raises(DiskError, match=match):
        store.storage_of(hold)
    other = send(store, values(2), ("disk", ALL))
    assert other is not None
    gone(other)
    assert torch.equal(back(store, other), values(2))


@pytest.mark.parametrize("how", ["unreadable", "truncated"])
def test_a_read_that_fails_is_told(
    how: str, make: Callable[..., ActivationStore], engine: DiskEngine, tmp_path: Path
) -> None:
    store = make()
    holds = [send(store, values(seed), ("disk", ALL)) for seed in range(3)]
    for hold in holds:
        assert hold is not None
        gone(hold)
    works = engine.pread
    if how == "unreadable":
        engine.pread = failing(errno.EIO)
    else:
        os.truncate(tmp_path / "activations0.bin", 4096)
    with pytest.raises(DiskError, match=r"activation 2 of layer 3.*activations0\.bin"):
        store.storage_of(holds[1])  # type: ignore[arg-type]
    engine.pread = works
    if how == "unreadable":
        assert torch.equal(back(store, holds[0]), values(0))  # type: ignore[arg-type]


def test_a_bit_that_flips_is_found(make: Callable[..., ActivationStore], tmp_path: Path) -> None:
    store = make()
    hold = send(store, values(0), ("disk", ALL))
    assert hold is not None
    gone(hold)
    with (tmp_path / "activations0.bin").open("r+b") as file:
        file.seek(70_000)
        byte = file.read(1)[0]
        file.seek(70_000)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(CorruptBlockError, match=r"activation 1 of layer 3.*offset 65536") as caught:
        store.storage_of(hold)
    assert caught.value.expected_checksum != caught.value.found_checksum


def test_a_short_write_is_finished(make: Callable[..., ActivationStore], engine: DiskEngine) -> None:
    engine.pwrite = lambda fd, buffers, offset: os.pwritev(fd, [buffers[0][:4096]], offset)
    store = make()
    hold = send(store, values(0), ("disk", ALL))
    assert hold is not None
    gone(hold)
    assert torch.equal(back(store, hold), values(0))


def test_waits_are_reported_and_given_up(
    make: Callable[..., ActivationStore], engine: DiskEngine, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()

    def hang(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        go_on.wait()
        return os.pwritev(fd, buffers, offset)

    engine.pwrite = hang
    store = make(leaving_nbytes=1, watch_s=0.01, stall_s=0.05)
    first = send(store, values(0, 200_000), ("disk", ALL))
    assert first is not None
    with caplog.at_level(logging.WARNING), pytest.raises(StallError, match="layer 3 waits for what it saved to leave"):
        send(store, values(1), ("disk", ALL))
    assert "layer 3 waits" in caplog.text
    go_on.set()
    assert torch.equal(back(store, first), values(0, 200_000))


def test_the_end_wakes_whoever_waits(make: Callable[..., ActivationStore]) -> None:
    store = make()
    hold = send(store, values(0), ("disk", ALL))
    assert hold is not None
    gone(hold)
    store.stop()
    with pytest.raises(ClosedError):
        store.storage_of(hold)
    with pytest.raises(ClosedError):
        send(store, values(0), ("disk", ALL))


# --- the order of one forward -----------------------------------------------------------------------------------------


def test_what_backward_comes_to_next_is_asked_for_before(make: Callable[..., ActivationStore]) -> None:
    """Units of unequal sizes: as much is on its way as the largest has, and everything moves once each way."""
    store = make(host_nbytes=0)
    trail = Trail(store)
    sizes = [[5000, 5000], [9000], [100], [4000, 4000], [2000]]
    holds: list[list[Hold]] = []
    for seed, unit in enumerate(sizes):
        number = trail.begin_unit()
        holds.append([])
        for size in unit:
            sent = values(seed, size)
            hold = send(store, sent, ("disk", ALL))
            assert hold is not None
            trail.add(hold, sent.untyped_storage(), 0, number)
            gone_later = hold
            holds[-1].append(gone_later)
    for unit in holds:
        for hold in unit:
            gone(hold)
    trail.end()
    for number in reversed(range(len(sizes))):
        trail.arrive(number)
        for hold, size in zip(holds[number], sizes[number], strict=True):
            assert torch.equal(back(store, hold), values(number, size))
        ahead = [h for unit in holds[:number] for h in unit if h.where is not Where.AWAY]
        assert not number or sum(h.nbytes for h in ahead) >= min(40_000, 4 * sum(map(sum, sizes[:number])))
    stats = store.statistics()
    assert stats.on_demand == 0
    assert stats.returned == stats.sent == 7


def test_a_storage_is_known_again_until_it_is_gone_or_changed(make: Callable[..., ActivationStore]) -> None:
    store = make()
    trail = Trail(store)
    unit = trail.begin_unit()
    tensor = values(0)
    hold = send(store, tensor, ("host", ALL))
    assert hold is not None
    trail.add(hold, tensor.untyped_storage(), tensor._version, unit)
    assert trail.find(tensor[5:].untyped_storage(), 0) is hold
    assert trail.find(tensor.untyped_storage(), 1) is None
    assert trail.find(values(0).untyped_storage(), 0) is None


def test_a_held_tensor_tells_that_it_was_changed_and_keeps_no_bytes(make: Callable[..., ActivationStore]) -> None:
    store = make()
    x = torch.ones(3000, requires_grad=True)
    tensor = x.exp()
    hold = send(store, tensor, ("disk", ALL))
    assert hold is not None
    held = HeldTensor(hold, tensor[5:].view(5, -1).t())
    gone(hold)
    held.check()
    assert torch.equal(held.shape.on(store.storage_of(hold)), tensor[5:].view(5, -1).t())
    tensor.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.check()


# --- regions ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20_000)), max_size=40), st.integers(4, 20))
def test_regions_never_overlap_and_all_comes_back(work: list[tuple[bool, int]], pages: int) -> None:
    regions = Regions(pages * 4096)
    taken: list[tuple[int, int]] = []
    for take, number in work:
        if take:
            offset = regions.take(number)
            if offset is not None:
                end = offset + -(-number // 4096) * 4096
                assert end <= pages * 4096
                assert all(end <= at or offset >= at + -(-size // 4096) * 4096 for at, size in taken)
                taken.append((offset, number))
        elif taken:
            regions.give(*taken.pop(number % len(taken)))
    used = sum(-(-size // 4096) * 4096 for _, size in taken)
    assert regions.statistics().used_nbytes == used
    for each in taken:
        regions.give(*each)
    assert regions.take(pages * 4096) == 0
