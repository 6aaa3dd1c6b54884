"""Reading against computing, compared with every other choice, and what computing takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.errors import UsageError
from penstock.scheduler.cost import CostModel
from penstock.scheduler.curves import Curve
from penstock.scheduler.hardware import Drive, Hardware, Processor
from penstock.scheduler.kv.prefilltime import REACH, CalibratedPrefill, MeasuredPrefill, prefill_s
from penstock.scheduler.kv.reuse import ReadTime, reuse
from penstock.scheduler.operations import Operation

MIB = 2**20


class Streamed:
    """Calls of a model whose weights take `sweep_s`, in whose shadow arithmetic goes on."""

    def __init__(self, sweep_s: float, linear: float, square: float) -> None:
        self.sweep_s, self.linear, self.square = sweep_s, linear, square

    def call_s(self, before: int, tokens: int) -> float:
        return max(self.sweep_s, self.linear * tokens + self.square * tokens * (before + tokens / 2))


@given(
    blocks=st.integers(0, 60),
    rest=st.integers(1, 100),
    rate=st.floats(1e6, 1e11),
    linear=st.floats(1e-7, 1e-2),
    square=st.floats(0, 1e-6),
    sweep_s=st.sampled_from((0.0, 0.5)),
    start_s=st.sampled_from((0.0, 0.01)),
    chunk=st.sampled_from((None, 100, 1000)),
)
def test_no_other_choice_is_faster(
    blocks: int,
    rest: int,
    rate: float,
    linear: float,
    square: float,
    sweep_s: float,
    start_s: float,
    chunk: int | None,
) -> None:
    model, tokens = Streamed(sweep_s, linear, square), blocks * 64 + rest

    def whole_s(read: int) -> float:
        """Token by token: who is called with what."""
        seconds = start_s + read * MIB / rate if read else 0.0
        left, before = tokens - read * 64, read * 64
        while left:
            new = min(left, chunk or left)
            seconds += model.call_s(before, new)
            left, before = left - new, before + new
        return seconds

    found = reuse(
        blocks,
        block_tokens=64,
        block_nbytes=MIB,
        reading=ReadTime(rate=rate, start_s=start_s),
        prefill_s=lambda before: prefill_s(model, before, tokens, chunk=chunk) or 0.0,
    )
    times = [whole_s(read) for read in range(blocks + 1)]
    assert found.seconds == pytest.approx(min(times), rel=1e-9)
    assert times[found.read_blocks] == pytest.approx(min(times), rel=1e-9)
    assert (found.compute_all_s, found.read_all_s) == pytest.approx((times[0], times[-1]), rel=1e-9)


def test_the_break_even_rate_of_a_known_model() -> None:
    """Llama-3.1-8B: 128 KiB and 16 GFLOP per token; at 400 TFLOP/s reading wins above 3.3 GB/s."""
    per_token = 16.06e9 / 400e12

    def read(rate: float) -> int:
        return reuse(
            100,
            block_tokens=64,
            block_nbytes=64 * 131072,
            reading=ReadTime(rate=rate),
            prefill_s=lambda before: per_token * (6401 - before),
        ).read_blocks

    assert (read(3.2e9), read(3.3e9)) == (0, 100)
    with pytest.raises(UsageError, match="above 0"):
        ReadTime(rate=0.0)


def test_a_part_is_read_where_that_saves_a_call() -> None:
    """Two calls of 100 tokens each take a second, whatever they hold: 3 blocks of 10 tokens make one of them go."""
    model = Streamed(1.0, 1e-3, 0.0)
    found = reuse(
        12,
        block_tokens=10,
        block_nbytes=MIB,
        reading=ReadTime(rate=10 * MIB),
        prefill_s=lambda before: prefill_s(model, before, 121, chunk=100) or 0.0,
    )
    assert (found.read_blocks, found.compute_all_s) == (3, 2.0)
    assert found.seconds == pytest.approx(1.3)
    assert found.read_all_s == pytest.approx(2.2)


def hardware(launch_s: float = 0.0) -> Hardware:
    cpu = Processor(
        name="cpu",
        memory_nbytes=2**34,
        memory=Curve.flat(1e9),
        linear={"float32": Curve(x=(1.0, 10.0, 100.0), y=(1e9, 1e9, 1e8))},
        attention={"float32": Curve.flat(2e9)},
        launch_s=launch_s,
    )
    drive = Drive(name="d", read=Curve.flat(1e9), write=Curve.flat(1e9))
    return Hardware(name="made up", cpu=cpu, host_nbytes=2**34, drives=(drive,))


def test_a_calibration_says_what_calls_take() -> None:
    layer = [
        Operation(kind="linear", nbytes=1e6, rows=10),
        Operation(kind="attention", nbytes=1e4, rows=40),
        Operation(kind="memory", nbytes=1e5),
    ]
    head = Operation(kind="linear", nbytes=5e6, rows=1)
    model = CalibratedPrefill(
        costs=CostModel(hardware=hardware(launch_s=1e-3)), operations=(*layer, *layer, head), tokens=10, sweep_s=0.025
    )
    # 100 tokens after 300: products at a tenth of the rate, keys of 400 tokens, ten times the other bytes
    each = 1e6 / 1e8 + 400 * 1e3 / 2e9 + 1e6 / 1e9
    assert model.call_s(300, 100) == pytest.approx(2 * each + 5e6 / 1e9 + 7e-3)
    assert model.call_s(0, 10) == 0.025  # weights take longer
    assert prefill_s(model, 0, 110, chunk=100) == pytest.approx(model.call_s(0, 100) + model.call_s(100, 10))
    assert prefill_s(model, 5, 5) == 0


def test_calls_that_were_measured_tell_about_others() -> None:
    known = MeasuredPrefill()
    assert known.call_s(0, 10) is None
    for before in range(0, 3000, 300):
        known.hear(before, 1, 0.5 + 0.01 + 1e-6 * (before + 0.5))  # decoding, ten times as often as prompts
    assert known.call_s(0, 1) is None, "decoding says nothing about prompts"
    for before, tokens in ((0, 500), (500, 500), (0, 100), (1000, 60)):
        known.hear(before, tokens, 0.5 + 0.01 * tokens + 1e-6 * tokens * (before + tokens / 2))
    for before, tokens in ((0, 2000), (3000, 700), (0, 1)):
        expected = 0.5 + 0.01 * tokens + 1e-6 * tokens * (before + tokens / 2)
        assert known.call_s(before, tokens) == pytest.approx(expected, rel=1e-6)
    assert known.call_s(1060 * REACH, 1) is None, "attention to a much longer context is not known"


def test_a_single_call_tells_seconds_per_token_and_late_ones_replace_early_ones() -> None:
    known = MeasuredPrefill()
    known.hear(0, 100, 2.0)
    assert known.call_s(0, 300) == pytest.approx(6.0)
    for _ in range(4):
        known.hear(0, 100, 1.0)
    assert known.call_s(0, 300) == pytest.approx(3.0)
    known.hear(0, 127, 1.0)
    known.hear(0, 64, 1.0)
    assert 0 <= (known.call_s(0, 20) or -1.0) <= 1.0  # no coefficient is below 0
