"""What the training benchmark counts as one step, of a contender whose update goes on beside the next step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.contenders import training
from benchmarks.contenders.training import SKIPPED, Job, measure_steps


class Lagging:
    """Reads 2 bytes and takes a second per forward, and moves 30 and 40 bytes for 5 s in each update, which ends beside
    the next forward or when it is waited for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.read = self.written = 0
        self.pending = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert ids.shape == (1, training.LENGTH)
        self.settle(beside_s=1.0)
        self.read += 2
        return torch.zeros(())

    def backward(self, loss: torch.Tensor) -> None:
        self.now += 2.0

    def update(self) -> None:
        self.pending = True

    def settle(self, beside_s: float = 0.0) -> None:
        self.now += max(5.0 * self.pending, beside_s)
        self.read += 30 * self.pending
        self.written += 40 * self.pending
        self.pending = False


@pytest.mark.parametrize("steps", [SKIPPED + 1, SKIPPED + 2, SKIPPED + 7])
def test_a_step_is_counted_with_its_own_update_and_no_other(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Lagging()
    monkeypatch.setattr(training, "moved", lambda: (run.read, run.written))
    monkeypatch.setattr(training.time, "perf_counter", lambda: run.now)
    job = Job(way="", checkpoint="", run="", cap_nbytes=0, batch=1, clip=None, steps=steps)
    found: dict[str, Any] = measure_steps(job, run.forward, run.backward, run.update, run.settle)
    assert (found["read_nbytes"], found["written_nbytes"]) == (32, 40)
    counted = steps - SKIPPED
    # 3 s of computing each, and 5 s of updates, of which all but the last hide one beside a forward
    assert found["step_s"] == pytest.approx((8 * counted - (counted - 1)) / counted)
    assert found["best_s"] == (7.0 if counted > 1 else 3.0)
    assert len(found["losses"]) == steps
