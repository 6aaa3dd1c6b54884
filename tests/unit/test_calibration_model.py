"""What a model's own Python costs, and what happens between its products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from penstock.runtime.calibration.elementwise import SIZES, Mixture, elementwise_curve
from penstock.runtime.calibration.framework import framework_cost
from penstock.runtime.programs import _Listener
from penstock.scheduler.operations import Operation


class PacedTimer:
    """Says that work takes what it is told."""

    def __init__(self, seconds: float) -> None:
        self.told = seconds
        self.calls = 0

    def seconds(self, work: object) -> float:
        assert callable(work)
        work()
        self.calls += 1
        return self.told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_counted_as_programs_count_them(dtype: torch.dtype) -> None:
    mixture = Mixture(torch.device("cpu"), dtype, 2**16)
    listener = _Listener(nn.Linear(1, 1))
    listener.recording = True
    with torch.no_grad(), listener:
        mixture.run()
    counted = sum(each.nbytes for each in listener.events if isinstance(each, Operation))
    # what has one element per row (means, roots) is not in the sum
    assert mixture.nbytes == pytest.approx(counted, rel=0.08)


def test_a_curve_leaves_out_what_starting_takes() -> None:
    class Sized:
        """As long as the largest tensor it meets says: a nanosecond for each byte, and a millisecond to start."""

        def seconds(self, work: object) -> float:
            nbytes = work.__self__.nbytes  # type: ignore[attr-defined]
            return 1e-3 + nbytes * 1e-9 if nbytes > 10_000 else 1e-3

    found = elementwise_curve(torch.device("cpu"), torch.float32, seconds=0.01, timer=Sized())
    assert found.x == tuple(3.0 * size for size in SIZES)
    assert found.y == pytest.approx([1e9] * len(SIZES))


def test_what_a_model_costs_is_told_per_operation() -> None:
    timer = PacedTimer(0.5)
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1e-3
        return now

    found = framework_cost(torch.device("cpu"), seconds=0.0, timer=timer, clock=clock)
    assert timer.calls >= 1
    products = 6 * 7 + 1
    operations = (0.5 - products * 1e-3) / found.value  # products in between, a tick of the clock each, do not count
    assert 6 * 40 < operations < 6 * 250  # of six layers
    assert operations == pytest.approx(round(operations))
