"""The order of copies and kernels on the CUDA backend: each test would fail if one event were missing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from penstock.memory.arena import POISON, AnyArena, HostArena
from penstock.memory.errors import ClosedError, DoesNotFitError

if TYPE_CHECKING:
    from penstock.runtime.devices.cuda import CudaDevice

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")

NBYTES = 4 * 2**20
LONG = 200_000_000
"""Clock cycles that a GPU is kept busy: about a tenth of a second."""
OLD, NEW = 17, 99


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    from penstock.runtime.devices.cuda import CudaDevice

    opened = CudaDevice(0)
    yield opened
    opened.close()


@pytest.fixture
def host(device: CudaDevice) -> Iterator[HostArena]:
    """An arena whose first half holds OLD and whose second half holds NEW."""
    arena = device.host_arena(2 * NBYTES)
    whole = device.tensor(arena)
    whole[:NBYTES] = OLD
    whole[NBYTES:] = NEW
    del whole
    yield arena
    device.close()
    arena.close()


@pytest.fixture
def target(device: CudaDevice, host: HostArena) -> Iterator[AnyArena]:
    """A device arena that holds OLD."""
    arena = device.device_arena(NBYTES)
    device.copy(host, 0, arena, 0, NBYTES)
    device.wait(device.copied())
    yield arena
    device.close()
    arena.close()


def slow_read(device: CudaDevice, arena: AnyArena) -> torch.Tensor:
    """Read the arena on the current stream, but late."""
    torch.cuda._sleep(LONG)
    return device.tensor(arena).clone()


def all_equal(tensor: torch.Tensor, value: int) -> bool:
    return bool((tensor == value).all())


def test_kernel_waits_for_the_copy_it_reads(device: CudaDevice, host: HostArena, target: AnyArena) -> None:
    with torch.cuda.stream(device._down):
        torch.cuda._sleep(LONG)
    device.copy(host, NBYTES, target, 0, NBYTES)
    device.compute_waits(device.copied())
    assert all_equal(device.tensor(target).clone(), NEW)


def test_copy_waits_for_the_kernel_that_still_reads(device: CudaDevice, host: HostArena, target: AnyArena) -> None:
    seen = slow_read(device, target)
    device.copies_wait(device.computed())
    device.copy(host, NBYTES, target, 0, NBYTES)
    assert all_equal(seen, OLD)
    device.wait(device.copied())
    assert all_equal(device.tensor(target), NEW)


def test_copy_waits_for_kernels_of_every_stream(device: CudaDevice, host: HostArena, target: AnyArena) -> None:
    """A slot keeps one event: that of the lease given back last must stand for the others too."""
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        seen = slow_read(device, target)
        device.computed()
    with torch.cuda.stream(second):
        quick = device.tensor(target).clone()
        last = device.computed()
    device.copies_wait(last)
    device.copy(host, NBYTES, target, 0, NBYTES)
    torch.cuda.synchronize()
    assert all_equal(seen, OLD)
    assert all_equal(quick, OLD)


def test_streams_that_came_to_rest_are_forgotten(device: CudaDevice) -> None:
    for _ in range(4):
        with torch.cuda.stream(torch.cuda.Stream()):
            device.computed()
        torch.cuda.synchronize()
    device.computed()
    assert len(device._released) == 1


def test_poison_comes_before_later_copies(device: CudaDevice, host: HostArena, target: AnyArena) -> None:
    device.poison(target, 0, NBYTES)
    device.copy(host, NBYTES, target, 0, NBYTES // 2)
    device.wait(device.copied())
    assert all_equal(device.tensor(target)[: NBYTES // 2], NEW)
    assert all_equal(device.tensor(target)[NBYTES // 2 :], POISON)


def test_new_arena_waits_for_the_last_reader_of_its_memory(device: CudaDevice, host: HostArena) -> None:
    """torch hands memory out again while kernels of its stream still read it; the copy stream must wait for them."""
    torch.cuda.empty_cache()
    before = torch.full((NBYTES,), OLD, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(LONG)
    seen = before.clone()
    address = before.data_ptr()
    del before
    arena = device.device_arena(NBYTES)
    try:
        if device.tensor(arena).data_ptr() != address:
            pytest.skip("torch's allocator gave other memory: there is nothing to wait for")
        device.copy(host, NBYTES, arena, 0, NBYTES)
        assert all_equal(seen, OLD)
    finally:
        device.close()
        arena.close()


def test_copies_do_not_block_the_host(device: CudaDevice, host: HostArena, target: AnyArena) -> None:
    with torch.cuda.stream(device._down):
        torch.cuda._sleep(5 * LONG)
    device.copy(host, NBYTES, target, 0, NBYTES)
    event = device.copied()
    assert isinstance(event, torch.cuda.Event)
    assert not event.query()
    device.wait(event)
    assert event.query()


def test_copy_back(device: CudaDevice, host: HostArena, target: AnyArena) -> None:
    device.copy_back(target, 0, host, NBYTES, NBYTES)
    device.wait(device.copied_back())
    assert all_equal(device.tensor(host), OLD)


def test_tensors_cross_after_what_computes_them(device: CudaDevice, host: HostArena) -> None:
    """Out: after the kernel that makes them. In: after a kernel that still reads the memory that they come into."""
    source = torch.full((NBYTES,), OLD, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(LONG)
    source.fill_(NEW)
    device.wait(device.copy_out(source, host, 0, device.computed()))
    assert all_equal(device.tensor(host)[:NBYTES], NEW)
    torch.cuda._sleep(LONG)
    seen = source.clone()
    device.tensor(host)[:NBYTES].fill_(OLD)
    event = device.copy_in(host, 0, source, device.computed())
    device.compute_waits(event)
    assert all_equal(seen, NEW)
    assert all_equal(source, OLD)


def test_host_arena_is_registered_exactly(device: CudaDevice) -> None:
    arena = device.host_arena(10 * 2**20 + 1)
    assert arena.nbytes == 10 * 2**20 + 4096
    assert arena.registered
    assert device.tensor(arena).numel() == arena.nbytes
    arena.close()
    arena.close()
    assert not arena.registered
    with pytest.raises(ClosedError):
        arena.view(0, 1)


def test_refused_registration_is_said_once_and_spoils_no_kernel(
    device: CudaDevice, host: HostArena, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        host._register()  # a second time: CUDA refuses
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert int(torch.ones(8, device="cuda").sum()) == 8
    host.registered = True  # the first one stands: let the fixture undo it


def test_arenas_do_not_share_tensors(device: CudaDevice) -> None:
    """Objects made one after another may have the same id; their memory must not be mixed up."""
    for pages in range(1, 20):
        arena = device.host_arena(pages * 4096)
        assert device.tensor(arena).numel() == pages * 4096
        assert device.tensor(arena).data_ptr() == arena.address
        arena.close()
        del arena


def test_device_memory_that_is_not_there(device: CudaDevice) -> None:
    _, total = torch.cuda.mem_get_info()
    with pytest.raises(DoesNotFitError) as caught:
        device.device_arena(2 * total)
    assert caught.value.tier == "device"
    assert "max_memory" in str(caught.value)
    assert 0 < device.available_nbytes() <= total
