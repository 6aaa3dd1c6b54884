"""The CUDA clock, against a device that is not there: times, captures, failures."""

from __future__ import annotations

import fakecuda
import pytest
from fakecuda import FakeCuda

from penstock.runtime.profiler import captures, cuda
from penstock.runtime.profiler.captures import aside
from penstock.runtime.profiler.cuda import CudaClock

MS = 1_000_000
US = 1000
Span = tuple[int, int, int]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return fakecuda.install(monkeypatch)


def record(device: FakeCuda, clock: CudaClock, told: list[Span], nanoseconds: int) -> None:
    begun = clock.begin()
    device.compute(nanoseconds)
    clock.end(begun, lambda *times: told.append(times))  # type: ignore[arg-type]


def test_a_span_has_the_time_of_the_device(device: FakeCuda) -> None:
    clock = CudaClock(0, device.clock)
    told: list[Span] = []
    device.compute(5 * MS)
    launched = device.now
    record(device, clock, told, 2 * MS)
    clock.poll()
    assert told == [], "the span has not completed"
    device.now += 10 * MS
    clock.poll()
    ((when, start, end),) = told
    assert abs(when - launched) < 10 * US
    assert abs(start - (launched + 5 * MS)) < 10 * US, "it queued behind what was there"
    assert abs(end - start - 2 * MS) < US


def test_spans_stay_in_place_where_the_clocks_drift_apart(device: FakeCuda) -> None:
    device.drift = 50e-6  # a lot: 180 ms in an hour
    clock = CudaClock(0, device.clock)
    told: list[Span] = []
    for second in range(600):
        launched = device.now
        outer = clock.begin()
        record(device, clock, told, 3 * MS)
        clock.end(outer, lambda *times: told.append(times))  # type: ignore[arg-type]
        device.now += 10**9
        clock.poll()
        inner, whole = told[-2:]
        assert whole[1] <= inner[1] <= inner[2] <= whole[2], "what is nested stays nested"
        assert abs(inner[1] - launched) < 150 * US, second  # the drift of a second, and what making it good lags behind
    starts = [span[1] for span in told[::2]]
    assert starts == sorted(starts)


def test_a_span_that_lasts_for_minutes_is_measured_from_before_it(device: FakeCuda) -> None:
    clock = CudaClock(0, device.clock)
    told: list[Span] = []
    began = device.now
    outer = clock.begin()
    for _ in range(300):
        record(device, clock, told, MS)
        device.now += 10**9
        clock.poll()
    clock.end(outer, lambda *times: told.append(times))  # type: ignore[arg-type]
    clock.finish()
    assert abs(told[-1][1] - began) < 10 * US
    assert abs(told[-1][2] - told[-1][1] - 300 * 10**9) < 20 * MS


def test_nothing_waits_for_the_programs_work_but_the_end(device: FakeCuda) -> None:
    clock = CudaClock(0, device.clock)
    told: list[Span] = []
    record(device, clock, told, 10**9)
    before = device.now
    clock.poll()
    assert device.now - before < MS
    assert told == []
    clock.finish()
    assert len(told) == 1
    assert device.now >= before + 10**9


def test_a_busy_single_queue_is_waited_for_once(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    # CUDA_DEVICE_MAX_CONNECTIONS=1: our stream is behind everybody's.
    monkeypatch.setattr(device, "Stream", lambda device_: device.stream_of_program)
    device.compute(50 * MS)
    clock = CudaClock(0, device.clock)
    assert 0 <= clock.error_ns < 10 * US, "it was not idle at first, and then it was"
    device.compute(5 * 10**9)
    device.now += 2 * 10**9
    before = device.now
    clock.poll()
    assert device.now - before < 2 * MS


def test_a_failed_device_loses_spans_and_raises_nothing(device: FakeCuda) -> None:
    clock = CudaClock(0, device.clock)
    told: list[Span] = []
    record(device, clock, told, MS)
    device.broken = True
    clock.poll()
    record(device, clock, told, MS)
    clock.finish()
    assert told == []


def test_a_capture_in_this_thread_is_left_alone(device: FakeCuda) -> None:
    clock = CudaClock(0, device.clock)
    device.capturing = True
    begun = clock.begin()
    assert begun is None
    clock.end(begun, lambda *times: None)
    clock.poll()


def test_events_are_read_without_harm_to_a_capture_in_another_thread(device: FakeCuda) -> None:
    clock = CudaClock(0, device.clock)
    told: list[Span] = []
    record(device, clock, told, MS)
    device.now += 2 * 10**9
    device.captured_elsewhere = True
    clock.poll()
    clock.finish()
    assert len(told) == 1
    assert not device.relaxed, "the mode of the thread is put back"


def test_without_a_way_to_read_events_there_is_no_clock(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captures, "exchange_mode", lambda: None)
    with pytest.raises(RuntimeError, match="without harm to graphs"):
        CudaClock(0, device.clock)
    monkeypatch.setattr(captures, "exchange_mode", lambda: lambda mode: 201)  # no context
    with aside(0) as safe:
        assert not safe


def test_spans_that_nobody_reads_do_not_fill_the_memory(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MOST_PENDING", 5)
    clock = CudaClock(0, device.clock)
    told: list[Span] = []
    for _ in range(9):
        record(device, clock, told, MS)
    clock.finish()
    assert len(told) == 5
    assert clock.spent_ns > 0
