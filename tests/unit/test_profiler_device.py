"""Recording a program that comes to use CUDA, or never does: nothing of ours is the first to touch it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import fakecuda
import pytest
import torch
from fakecuda import FakeCuda
from torch import nn

from penstock.runtime.profiler.clocks import LOOK_NS, HostClock, LateClock
from penstock.runtime.profiler.device import BETWEEN_NS, UsedDevice
from penstock.runtime.profiler.profiler import Profiler
from penstock.runtime.profiler.schema import Compute, Gauge, Mark, Meter

MIB = 2**20


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    found = fakecuda.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", found.is_current_stream_capturing)
    monkeypatch.setattr(found, "clock", time.monotonic_ns)  # what is recorded has real times here
    found.now = 0
    found.initialized = False
    return found


def test_a_device_is_used_once_something_is_on_it(device: FakeCuda) -> None:
    now = [0]
    used = UsedDevice(lambda: now[0])
    assert used.look() is None
    device.initialized = True
    assert used.look() is None, "a program that has only asked how many there are computes elsewhere"
    device.reserved = {0: MIB, 1: 20 * MIB}
    assert used.look() is None, "it is not looked at that often"
    now[0] = BETWEEN_NS
    assert used.look() == 1
    device.reserved[0] = 100 * MIB
    assert used.look() == 1
    assert device.asked == []


def test_an_allocator_without_statistics_leaves_the_current_device(
    device: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(index: int) -> int:
        raise RuntimeError("CUDAPluggableAllocator does not support getDeviceStats")

    monkeypatch.setattr(device, "memory_reserved", refuse)
    device.initialized = True
    assert UsedDevice().look() == 0


class Recorded(HostClock):
    """A device's clock that tells which spans it was given."""

    def __init__(self) -> None:
        super().__init__(lambda: 7)
        self.finished = False

    def finish(self) -> None:
        self.finished = True


def test_a_span_ends_by_the_clock_that_it_began_by() -> None:
    there: list[Recorded] = []
    failures: list[Exception] = []
    now = [1]
    clock = LateClock(lambda: now[0], lambda: there[0] if there else None, failures.append)
    told: list[tuple[int, int]] = []

    def done(launched: int, start: int, end: int) -> None:
        told.append((start, end))

    outer = clock.begin()
    there.append(Recorded())
    clock.end(clock.begin(), done)
    assert told == [(1, 1)], "it is not looked for that often"
    now[0] += LOOK_NS
    clock.end(clock.begin(), done)
    clock.end(outer, done)
    assert told[1:] == [(7, 7), (1, 1 + LOOK_NS)]
    clock.poll()
    clock.finish()
    assert there[0].finished
    assert failures == []


def test_a_clock_that_cannot_be_made_is_not_asked_for_again() -> None:
    asked = []
    now = [0]

    def find() -> None:
        asked.append(1)
        raise RuntimeError("no events")

    failures: list[Exception] = []
    clock = LateClock(lambda: now[0], find, failures.append)
    for _ in range(3):
        clock.end(clock.begin(), lambda *times: None)
        now[0] += LOOK_NS
    assert (len(asked), len(failures)) == (1, 1)


@pytest.mark.parametrize("level", ["light", "full"])
def test_facts_meters_and_times_of_a_device_come_when_the_program_uses_it(
    device: FakeCuda, tmp_path: Path, level: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with Profiler(tmp_path / "run.prof", level) as profiler:  # type: ignore[arg-type]
        model(torch.ones(1, 4))
        time.sleep(0.3)
        early = profiler._writer.header
        assert "gpu" not in early.machine
        assert device.asked == []
        device.initialized = True
        device.reserved[1] = 6 * MIB
        time.sleep(0.05)
        for _ in range(3):
            device.now = time.monotonic_ns()
            model(torch.ones(1, 4))
        device.now = time.monotonic_ns()
        time.sleep(0.3)
    profile = profiler.profile()
    assert profile.header.machine["gpu"] == "Fake (cuda:1)"
    assert profile.header.capacities["DEVICE"] == 8 * 2**30
    gauges = profile[Gauge]
    assert set(gauges.value[gauges.meter == Meter.DEVICE_ALLOCATED].tolist()) == {3 * MIB}
    assert set(gauges.value[gauges.meter == Meter.DEVICE_USED].tolist()) == {5 * 2**30}
    launched = profile[Compute].launched
    assert (launched < 0).any(), "by the host's clock at first"
    assert (launched >= 0).any(), "and by the device's later"
    marks = [profile.string(number) for number in profile[Mark].text.tolist()]
    assert any(mark.startswith("spans have the times of cuda:1 from here on, within") for mark in marks)
    assert not any("recorder:" in mark for mark in marks), marks


def test_a_program_that_uses_cuda_already_has_its_facts_in_the_first_segment(device: FakeCuda, tmp_path: Path) -> None:
    device.initialized = True
    device.reserved[0] = MIB
    with Profiler(tmp_path / "run.prof") as profiler:
        assert profiler._writer.header.machine["gpu"] == "Fake (cuda:0)"
    assert Meter.DEVICE_RESERVED in profiler.profile()[Gauge].meter.tolist()


def test_a_program_may_use_torchs_profiler_while_it_is_recorded(tmp_path: Path) -> None:
    before = torch.autograd.profiler.profile._prepare_trace  # type: ignore[attr-defined]
    with Profiler(tmp_path / "run.prof", "full"), torch.profiler.profile(acc_events=True) as traced:
        nn.Linear(4, 4)(torch.ones(1, 4))
    assert any(event.key == "aten::linear" for event in traced.key_averages())
    assert torch.autograd.profiler.profile._prepare_trace is before  # type: ignore[attr-defined]


SCRIPT = """
import os, sys
import torch
from torch import nn

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # obeyed only where nobody has asked CUDA before
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
for _ in range(3):  # no optimizer: those ask whether there is CUDA by themselves
    model(torch.ones(2, 8)).sum().backward()
pid = os.fork()
if pid == 0:
    os._exit(3 if hasattr(torch._C, "_cuda_isInBadFork") and torch._C._cuda_isInBadFork() else 0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""

RUNNER = """
import sys
import torch

touched = []


def trap(owner, name):
    def touch(*args, **kwargs):
        touched.append(name)
        raise AssertionError(f"{name} initialises CUDA")

    if hasattr(owner, name):
        setattr(owner, name, touch)


for name in ("init", "_lazy_init", "is_available", "device_count", "current_device", "get_device_name",
             "get_device_properties", "synchronize", "mem_get_info", "set_device", "current_stream"):
    trap(torch.cuda, name)
for name in ("_cuda_init", "_cuda_getDeviceCount", "_cuda_getDevice", "_cuda_isCurrentStreamCapturing"):
    trap(torch._C, name)
from penstock.cli import main

sys.argv[0] = "penstock"
code = main()
assert not touched, touched
sys.exit(code)
"""


@pytest.mark.parametrize("level", ["light", "full"])
def test_recording_a_script_initialises_nothing(tmp_path: Path, level: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "runner.py").write_text(RUNNER)
    command = ["prof", "run", "-o", "run.prof", "--level", level, "script.py"]
    ended = subprocess.run(
        [sys.executable, "runner.py", *command], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "incomplete" not in ended.stderr
    assert (tmp_path / "run.prof").stat().st_size
