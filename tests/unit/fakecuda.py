"""A CUDA device for machines that have none: streams in time order, events with times, captures, and an allocator.

Time passes when somebody looks at the host's clock. The device's clock runs a little fast and started at another time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace

import pytest

LOOK_NS = 1000
"""How long a look at the clock takes."""


class Stream:
    def __init__(self, device: object = None) -> None:
        self.free_at = 0
        """When what has been enqueued will be done, in host time."""


class Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.at: int | None = None

    def record(self, stream: Stream | None = None) -> None:
        assert self._cuda.initialized
        assert not self._cuda.capturing, "recorded into a graph"
        stream = stream or self._cuda.stream_of_program
        self.at = max(self._cuda.now, stream.free_at)

    def query(self) -> bool:
        self._cuda.unsafe()
        assert self.at is not None
        return self._cuda.now >= self.at

    def synchronize(self) -> None:
        self._cuda.unsafe()
        assert self.at is not None
        self._cuda.now = max(self._cuda.now, self.at)

    def elapsed_time(self, later: Event) -> float:
        assert self.at is not None
        assert later.at is not None
        assert later.at >= self.at, "an event must be measured from an earlier one"
        return (later.at - self.at) * (1 + self._cuda.drift) / 1e6


class FakeCuda:
    """Stands in for `torch.cuda` where the profiler uses it."""

    def __init__(self) -> None:
        self.now = 10**9
        self.drift = 0.0
        self.initialized = True
        self.capturing = False
        self.captured_elsewhere = False
        self.relaxed = False
        self.broken = False
        self.reserved = {0: 0, 1: 0}
        self.stream_of_program = Stream()
        self.asked: list[str] = []
        """What would have initialised CUDA."""
        self.synchronized = 0

    def clock(self) -> int:
        self.now += LOOK_NS
        return self.now

    def compute(self, nanoseconds: int) -> None:
        """The program enqueues a kernel."""
        self.stream_of_program.free_at = max(self.now, self.stream_of_program.free_at) + nanoseconds

    def unsafe(self) -> None:
        """A call that CUDA forbids while a graph is captured, to those that are not relaxed."""
        if self.broken:
            raise RuntimeError("device-side assert")
        assert self.relaxed or not (self.capturing or self.captured_elsewhere), "the program's capture is broken"

    # --- what the driver and torch offer ----------------------------------------------------------------------------

    def exchange(self, mode: object) -> int:
        """`cuThreadExchangeStreamCaptureMode`"""
        held: ctypes.c_int = mode._obj  # type: ignore[attr-defined]
        before, self.relaxed = self.relaxed, held.value == 2
        held.value = 2 if before else 0
        return 0

    def Event(self, *, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)

    def Stream(self, device: object) -> Stream:
        return Stream()

    def device(self, device: object) -> AbstractContextManager[None]:
        self._must_be_initialized("device")
        return nullcontext()

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.capturing = self.capturing, False
        yield
        self.capturing = before

    def current_stream(self, device: object) -> Stream:
        self._must_be_initialized("current_stream")
        return self.stream_of_program

    def synchronize(self, device: object = None) -> None:
        raise AssertionError("the program's work is waited for")

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def is_initialized(self) -> bool:
        return self.initialized

    def is_available(self) -> bool:
        self.asked.append("is_available")
        return True

    def device_count(self) -> int:
        self._must_be_initialized("device_count")
        return len(self.reserved)

    def current_device(self) -> int:
        self._must_be_initialized("current_device")
        return 0

    def memory_reserved(self, index: int) -> int:
        return self.reserved[index] if self.initialized else 0

    def memory_allocated(self, index: int) -> int:
        return self.reserved[index] // 2

    def mem_get_info(self, index: int) -> tuple[int, int]:
        self._must_be_initialized("mem_get_info")
        self.unsafe()
        return 3 * 2**30, 8 * 2**30

    def get_device_properties(self, index: int) -> SimpleNamespace:
        self._must_be_initialized("get_device_properties")
        return SimpleNamespace(name="Fake", total_memory=8 * 2**30, uuid="0-1-2")

    def _must_be_initialized(self, what: str) -> None:
        if not self.initialized:
            self.asked.append(what)


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Put one where the profiler looks for CUDA."""
    from penstock.runtime.profiler import captures, cuda, device, devicemeters, facts, kernels

    fake = FakeCuda()
    for module in (captures, cuda, device, devicemeters, facts, kernels):
        monkeypatch.setattr(module, "_cuda", fake)
    monkeypatch.setattr(captures, "exchange_mode", lambda: fake.exchange)
    return fake
