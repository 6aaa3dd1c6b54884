"""Calibrating a GPU: timers that see the GPU's work and nothing else, and figures that a GPU can have."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch

from penstock.runtime.calibration.adam import adam_rate
from penstock.runtime.calibration.cache import CalibrationCache
from penstock.runtime.calibration.calibrate import calibrate
from penstock.runtime.calibration.fingerprint import fingerprint
from penstock.runtime.calibration.link import measure_link
from penstock.runtime.calibration.products import linear_curve
from penstock.runtime.calibration.sharing import copy_load
from penstock.runtime.calibration.timing import CudaTimer, SynchronizingTimer, device_timer, host_timer
from penstock.scheduler.calibration import Calibration

if TYPE_CHECKING:
    from penstock.runtime.devices.cuda import CudaDevice

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")

MIB: Final = 2**20
LONG: Final = 200_000_000
"""Clock cycles that a GPU is kept busy: about a tenth of a second."""
_cuda: Final[Any] = torch.cuda


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    from penstock.runtime.devices.cuda import CudaDevice

    opened = CudaDevice(0)
    yield opened
    opened.close()


def busy() -> None:
    _cuda._sleep(LONG)


def test_timers_wait_for_the_gpu(device: CudaDevice) -> None:
    gpu = device.torch_device
    assert isinstance(device_timer(gpu), CudaTimer)
    assert isinstance(host_timer(gpu), SynchronizingTimer)
    device_timer(gpu).seconds(busy)  # the first launch loads the kernel
    by_events = device_timer(gpu).seconds(busy)
    by_host = host_timer(gpu).seconds(busy)
    assert by_events > 0.02
    assert by_host == pytest.approx(by_events, rel=0.3)


def test_events_leave_out_what_was_enqueued_before(device: CudaDevice) -> None:
    timer = device_timer(device.torch_device)
    timer.seconds(busy)
    long = timer.seconds(busy)
    busy()
    assert timer.seconds(lambda: None) < long / 2


def test_events_leave_out_what_the_host_does_meanwhile(device: CudaDevice) -> None:
    timer = device_timer(device.torch_device)
    timer.seconds(busy)
    long = timer.seconds(busy)

    def enqueue_and_dawdle() -> None:
        busy()
        time.sleep(long / 2)

    assert timer.seconds(enqueue_and_dawdle) == pytest.approx(long, rel=0.3)


def test_a_link(device: CudaDevice) -> None:
    link = measure_link(device, nbytes=32 * MIB, seconds=0.5)
    assert link.h2d.x[-1] == 16 * MIB
    assert link.h2d_pageable is not None
    assert link.d2h_pageable is not None
    # Any PCIe link is between one lane of the second generation and NVLink to a host.
    for rate in (link.h2d.best, link.d2h.best):
        assert 3e8 < rate < 1e12
    assert link.h2d.y[-1] >= link.h2d.y[0]  # small copies are no faster
    assert link.h2d.best >= 0.7 * link.h2d_pageable.best
    assert 0.3 <= link.duplex <= 1.0
    assert 1e-7 < link.latency_s < 1e-2


def test_copies_go_on_in_the_background(device: CudaDevice) -> None:
    host, target = device.host_arena(8 * MIB), device.device_arena(8 * MIB)
    with copy_load(device, host, target)() as copied:
        time.sleep(0.2)
        first = copied()
        time.sleep(0.2)
        assert copied() > first > 0
    at_the_end = copied()
    time.sleep(0.05)
    assert copied() == at_the_end
    device.close()
    target.close()
    host.close()


def test_products_are_bound_by_memory_first_and_by_arithmetic_then(device: CudaDevice) -> None:
    gpu = device.torch_device
    curve = linear_curve(gpu, torch.float16, nbytes=512 * MIB, seconds=0.5, timer=device_timer(gpu), rows=(1, 16, 4096))
    assert 2e10 < curve.y[0] < 2e13
    assert curve.y[2] < curve.y[0]
    operations = 2 * 4096 * curve.y[2] / 2
    assert 1e12 < operations < 1e16


def test_adam(device: CudaDevice) -> None:
    gpu = device.torch_device
    found = adam_rate(gpu, nbytes=256 * MIB, seconds=0.3, timer=device_timer(gpu))
    assert found.elements.value > 1e8


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Calibration, Path]:
    from penstock.runtime.devices.cuda import CudaDevice

    folder = tmp_path_factory.mktemp("scratch")
    opened = CudaDevice(0)
    try:
        return calibrate(opened, [str(folder)], quick=True), folder
    finally:
        opened.close()


def test_a_whole_calibration(whole: tuple[Calibration, Path]) -> None:
    found, folder = whole
    assert not [note for note in found.notes if "not measured" in note]
    assert found.device == "cuda:0"
    gpu, link = found.hardware.gpu, found.hardware.link
    assert gpu is not None
    assert link is not None
    assert not found.hardware.emulated
    assert gpu.memory_nbytes == torch.cuda.get_device_properties(0).total_memory
    # Weights of one row come from memory: never faster than it is read, which copying both ways bounds.
    assert gpu.linear_rate("bfloat16", 1) < 1.3 * gpu.memory.best
    assert gpu.linear_rate("bfloat16", 1) > found.hardware.cpu.linear_rate("bfloat16", 1)
    assert 1e-7 < gpu.launch_s < 1e-3
    assert os.listdir(folder) == []


def test_it_is_kept_and_trusted(whole: tuple[Calibration, Path], device: CudaDevice, tmp_path: Path) -> None:
    found, _ = whole
    here = fingerprint(device.torch_device, [])
    assert here.gpus == found.fingerprint.gpus
    assert here.gpus[0].name == torch.cuda.get_device_name(0)
    assert here.gpus[0].uuid
    cache = CalibrationCache(tmp_path)
    cache.write(found, device)
    assert cache.read(device).trusted == found
