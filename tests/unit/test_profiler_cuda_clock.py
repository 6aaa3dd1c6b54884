"""The CUDA clock against a device that fails, without a device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest

from penstock.runtime.profiler import cuda
from penstock.runtime.profiler.cuda import CudaClock


class Event:
    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        raise RuntimeError("device-side assert")


class Device:
    capturing = False

    def Event(self, *, enable_timing: bool) -> Event:
        return Event()

    def device(self, device: object) -> AbstractContextManager[None]:
        return nullcontext()

    def current_stream(self, device: object) -> None: ...

    def synchronize(self, device: object) -> None: ...

    def is_current_stream_capturing(self) -> bool:
        return self.capturing


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(cuda, "_cuda", found)
    return found


def test_a_failed_device_loses_spans_and_raises_nothing(device: Device) -> None:
    clock = CudaClock(0)
    told: list[int] = []
    clock.end(clock.begin(), lambda *times: told.extend(times))
    clock.poll()
    clock.end(clock.begin(), lambda *times: told.extend(times))
    clock.finish()
    assert told == []


def test_a_capture_is_left_alone(device: Device) -> None:
    clock = CudaClock(0)
    device.capturing = True
    begun = clock.begin()
    assert begun is None
    clock.end(begun, lambda *times: None)
    clock.poll()
