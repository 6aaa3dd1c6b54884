"""Loading against computing, compared with every other choice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.errors import UsageError
from penstock.scheduler.kv.reuse import reuse

MIB = 2**20


@given(
    blocks=st.integers(0, 60),
    rate=st.floats(1e6, 1e11),
    linear=st.floats(1e-7, 1e-2),
    square=st.floats(0, 1e-6),
    sweep=st.sampled_from((0.0, 0.5)),
    start_s=st.sampled_from((0.0, 0.01)),
    at_once=st.booleans(),
)
def test_no_other_choice_is_faster(
    blocks: int, rate: float, linear: float, square: float, sweep: float, start_s: float, at_once: bool
) -> None:
    def prefill_s(tokens: int) -> float:
        return sweep + linear * tokens + square * tokens**2

    found = reuse(
        blocks,
        block_tokens=64,
        block_nbytes=MIB,
        rate=rate,
        prefill_s=prefill_s,
        start_s=start_s,
        at_once=at_once,
    )
    assert found.computed_blocks + found.loaded_blocks == blocks
    times = {
        computed: max(
            prefill_s(64 * computed) if computed else 0.0,
            start_s + (blocks - computed) * MIB / rate if computed < blocks else 0.0,
        )
        for computed in (range(blocks + 1) if at_once else {0, blocks})
    }
    assert found.seconds == times[found.computed_blocks] == min(times.values())


def test_the_break_even_rate_of_a_known_model() -> None:
    """Llama-3.1-8B: 128 KiB and 16 GFLOP per token; at 400 TFLOP/s loading wins above 3.3 GB/s."""
    per_token = 16.06e9 / 400e12

    def alone(rate: float) -> int:
        return reuse(
            100,
            block_tokens=64,
            block_nbytes=64 * 131072,
            rate=rate,
            prefill_s=lambda tokens: per_token * tokens,
            at_once=False,
        ).loaded_blocks

    assert (alone(3.2e9), alone(3.3e9)) == (0, 100)
    both = reuse(
        100, block_tokens=64, block_nbytes=64 * 131072, rate=131072 / per_token, prefill_s=lambda n: per_token * n
    )
    assert (both.computed_blocks, both.loaded_blocks) == (50, 50)
    with pytest.raises(UsageError, match="0"):
        reuse(1, block_tokens=1, block_nbytes=1, rate=0.0, prefill_s=float)
