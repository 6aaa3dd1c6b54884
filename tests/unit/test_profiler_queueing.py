"""How long kernels queue: the arithmetic on kineto's events, and when kineto runs at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import fakecuda
import pytest
import torch
from fakecuda import FakeCuda
from torch import nn

from penstock.runtime.profiler import kernels
from penstock.runtime.profiler.device import UsedDevice
from penstock.runtime.profiler.kernels import LONG_ENOUGH_NS, MOST_NS, STEPS, WARM_STEPS, KernelWatch
from penstock.runtime.profiler.queueing import Queued, queued
from penstock.runtime.profiler.recorder import Recorder
from penstock.runtime.profiler.ring import Ring
from penstock.runtime.profiler.schema import Launches, Record

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


@dataclass(frozen=True)
class Event:
    what: str
    where: Any
    start: int
    number: int
    annotation: bool = False

    def name(self) -> str:
        return self.what

    def device_type(self) -> Any:
        return self.where

    def start_ns(self) -> int:
        return self.start

    def correlation_id(self) -> int:
        return self.number

    def is_user_annotation(self) -> bool:
        return self.annotation


def test_a_kernel_queues_from_its_launch_to_its_start() -> None:
    events = [
        Event("void gemm<float>", CUDA, 150, 7),
        Event("cudaLaunchKernel", CPU, 100, 7),
        Event("cuLaunchKernelEx", CPU, 110, 8),
        Event("triton_poi_fused_0", CUDA, 190, 8),
    ]
    assert queued(events) == Queued(launches=2, ns=50 + 80)


def test_what_is_no_kernel_or_has_lost_its_other_half_does_not_count() -> None:
    events = [
        Event("cudaMemcpyAsync", CPU, 10, 1),
        Event("Memcpy HtoD (Pinned -> Device)", CUDA, 90, 1),
        Event("cudaMemsetAsync", CPU, 10, 2),
        Event("Memset (Device)", CUDA, 90, 2),
        Event("cudaLaunchKernel", CPU, 10, 3),  # its kernel ran after the end
        Event("void late()", CUDA, 5, 4),  # launched before the beginning
        Event("cudaDeviceSynchronize", CPU, 10, 5),
        Event("cudaLaunchKernel", CPU, 10, 0),
        Event("void unknown()", CUDA, 50, 0),
    ]
    assert queued(events) == Queued(launches=0, ns=0)


def test_numbers_of_operators_and_annotations_are_not_those_of_launches() -> None:
    events = [
        Event("aten::mm", CPU, 1, 7),  # counted apart, and equal by chance
        Event("cudaLaunchKernel", CPU, 100, 7),
        Event("training step", CUDA, 20, 7, annotation=True),
        Event("void gemm<float>", CUDA, 130, 7),
        Event("aten::add", CPU, 1, 9),
    ]
    assert queued(events) == Queued(launches=1, ns=30)


def test_a_graph_counts_once_and_clocks_may_differ() -> None:
    events = [
        Event("cudaGraphLaunch", CPU, 100, 1),
        *(Event(f"node {n}", CUDA, 400 - 100 * n, 1) for n in range(3)),  # 400, 300, 200
        Event("cudaLaunchKernel", CPU, 500, 2),
        Event("early by a little", CUDA, 499, 2),
    ]
    assert queued(events) == Queued(launches=2, ns=100)


class Kineto:
    """Stands in for `torch.autograd.profiler.profile`."""

    under_way: ClassVar[list[Kineto]] = []
    all: ClassVar[list[Kineto]] = []

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.kineto_results: Any = None

    def _prepare_trace(self) -> None:
        assert not Kineto.under_way, "one at a time"

    def __enter__(self) -> Kineto:
        self._prepare_trace()
        Kineto.under_way.append(self)
        Kineto.all.append(self)
        return self

    def __exit__(self, *failure: object) -> None:
        Kineto.under_way.remove(self)
        launch, kernel = Event("cudaLaunchKernel", CPU, 100, 7), Event("gemm", CUDA, 150, 7)
        self.kineto_results = SimpleNamespace(events=lambda: [launch, kernel])


class Run:
    """A recording's recorder with a clock of its own, and a watch."""

    def __init__(self) -> None:
        self.now = 0
        self.ring = Ring(capacity_nbytes=2**20)
        self.recorder = Recorder(self.ring, clock=lambda: self.now)
        self.used = UsedDevice()
        self.watch = KernelWatch(self.recorder, self.used)

    def step(self, nanoseconds: int = 1000) -> None:
        self.recorder.begin_step("train")
        self.now += nanoseconds
        self.watch.module_returned(0, 0, (), None)

    def found(self) -> list[Record]:
        self.watch.poll()
        return [record for record in self.ring.drain() if isinstance(record, Launches)]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    found = fakecuda.install(monkeypatch)
    Kineto.all, Kineto.under_way = [], []
    prepare = Kineto._prepare_trace
    monkeypatch.setattr(kernels, "_profiler", SimpleNamespace(profile=Kineto, _is_profiler_enabled=False))
    monkeypatch.setattr(torch.profiler, "supported_activities", lambda: {torch.profiler.ProfilerActivity.CUDA})
    yield found
    assert Kineto._prepare_trace is prepare, "it is left as it was"
    assert Kineto.under_way == []


@pytest.fixture
def run(device: FakeCuda) -> Run:
    return Run()


def test_a_few_steady_steps_are_traced_and_no_more(run: Run) -> None:
    with run.watch:
        for _ in range(5):
            run.step()
        assert Kineto.all == [], "CUDA is not in use"
        run.used.index = 0
        for _ in range(WARM_STEPS):
            run.step()
        assert Kineto.all == []
        for _ in range(50):
            run.step()
    (kineto,) = Kineto.all
    assert kineto.options == {"use_cpu": False, "use_device": "cuda", "use_kineto": True}
    start = (5 + WARM_STEPS) * 1000
    assert run.found() == [Launches(start=start, end=start + STEPS * 1000, steps=STEPS, launches=1, queued=50)]


def traced(run: Run) -> None:
    """Up to where the first traced step has begun and taken its time."""
    run.used.index = 0
    for _ in range(WARM_STEPS + 1):
        run.step()
    assert len(Kineto.under_way) == 1


def test_slow_steps_are_traced_one_by_one(run: Run) -> None:
    with run.watch:
        run.used.index = 0
        for _ in range(WARM_STEPS):
            run.step()
        run.step(LONG_ENOUGH_NS + 1)
        run.step()
        (found,) = run.found()
    assert isinstance(found, Launches)
    assert found.steps == 1


def test_a_step_that_does_not_end_is_cut(run: Run) -> None:
    with run.watch:
        traced(run)
        run.now += MOST_NS
        run.watch.module_returned(0, 0, (), None)
        (found,) = run.found()
    assert isinstance(found, Launches)
    assert found.steps == 0


def test_a_recording_that_ends_meanwhile_keeps_what_was_seen(run: Run) -> None:
    with run.watch:
        traced(run)
    (found,) = run.found()
    assert isinstance(found, Launches)
    assert found.steps == 1


def test_a_program_that_profiles_itself_comes_first(run: Run) -> None:
    with run.watch:
        traced(run)
        with Kineto(of="the program"):
            assert len(Kineto.under_way) == 1
        for _ in range(50):
            run.step()
    assert len(Kineto.all) == 2


def test_a_program_that_has_profiled_itself_is_left_alone(run: Run) -> None:
    with run.watch:
        with Kineto(of="the program"):
            pass
        run.used.index = 0
        for _ in range(50):
            run.step()
    assert len(Kineto.all) == 1


def test_a_program_that_profiles_itself_already_is_left_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels._profiler, "_is_profiler_enabled", True)
    with run.watch:
        run.used.index = 0
        for _ in range(50):
            run.step()
    assert Kineto.all == []


def test_a_capture_is_neither_begun_nor_ended_in(run: Run, device: FakeCuda) -> None:
    with run.watch:
        run.used.index = 0
        device.capturing = True
        for _ in range(WARM_STEPS + 5):
            run.step()
        assert Kineto.all == []
        device.capturing = False
        run.step()
        device.capturing = True
        for _ in range(STEPS + 5):
            run.step()
        assert len(Kineto.under_way) == 1
        device.capturing = False
        run.step()
        assert Kineto.under_way == []


def test_steps_of_other_threads_do_not_end_it(run: Run) -> None:
    with run.watch:
        traced(run)
        other = threading.Thread(target=lambda: [run.step() for _ in range(STEPS)])
        other.start()
        other.join()
        assert len(Kineto.under_way) == 1
        for _ in range(STEPS):
            run.step()
        assert Kineto.under_way == []


def test_a_torch_without_kernels_records_all_the_rest(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "supported_activities", set)
    with run.watch:
        run.used.index = 0
        for _ in range(50):
            run.step()
    assert run.found() == []


def test_torchs_own_profiler_has_what_is_needed() -> None:
    profile: Any = torch.autograd.profiler.profile
    assert callable(profile._prepare_trace)
    assert isinstance(torch.autograd.profiler._is_profiler_enabled, bool)
    with profile(use_cpu=True, use_kineto=True) as kineto:
        nn.Linear(4, 4)(torch.ones(1, 4))
    assert queued(kineto.kineto_results.events()) == Queued(launches=0, ns=0)
