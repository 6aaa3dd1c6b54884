"""What is measured before many prompts run, and when not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from penstock.runtime import throughput_start
from penstock.runtime.throughput_sizes import with_buffers
from penstock.runtime.throughput_start import Asked, products_for
from penstock.runtime.widening import LANE_NBYTES, Products, measuring_nbytes
from penstock.scheduler.curves import Curve
from penstock.scheduler.microbatches import Footprint

MEASURED = Products(rates=Curve.flat(1e9), wide_from=8)
FOOTPRINT = Footprint(
    kv_nbytes_per_token=1, activation_nbytes_per_token=1, held_nbytes_per_token=1, logits_nbytes_per_sequence=1
)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput_start, "measure_products", lambda dtype, inputs: MEASURED)


def model(weights: int, device: str = "meta") -> Any:
    parameters = [torch.empty(weights // 1000, 1000, device="meta")]
    return SimpleNamespace(
        device=torch.device(device), dtype=torch.bfloat16, parameters=lambda: parameters, modules=lambda: []
    )


def asked(tokens: int) -> list[Asked]:
    return [Asked(index=0, ids=(1,) * (tokens // 2), new_tokens=tokens // 2, name="prompt 0")]


def test_products_are_measured_where_there_is_room_for_it() -> None:
    """10⁹ weights by 2000 tokens: 4 · 10¹² operations."""
    needed = measuring_nbytes(torch.bfloat16, 1000)
    assert products_for(model(10**9), asked(2000), room_nbytes=needed) is MEASURED
    assert products_for(model(10**9), asked(2000), room_nbytes=needed - 1) is None
    assert needed == 88 * 2**20 + 512 * (1000 + 2048) * 2
    assert measuring_nbytes(torch.float32, 16384) == 88 * 2**20 + 512 * (16384 + 2048) * 4


class Experts(nn.Module):
    """40 of them, [outputs, inputs] or the other way round."""

    dtype, device = torch.bfloat16, torch.device("meta")

    def __init__(self, *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shape = (5000, 6000) if is_transposed else (6000, 5000)
        self.up_proj = nn.Parameter(torch.empty(40, *shape, device="meta"))
        self.up_proj_bias = nn.Parameter(torch.empty(40, 6000, device="meta"))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_products_are_measured_with_the_inputs_that_most_weights_have(
    is_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput_start, "measure_products", lambda dtype, inputs: inputs)
    found: Any = products_for(Experts(is_transposed=is_transposed), asked(2000), room_nbytes=2**40)
    assert found == 5000


def test_products_are_not_measured_for_little_work_or_another_device() -> None:
    assert products_for(model(10**9), asked(900), room_nbytes=2**40) is None
    assert products_for(model(10**9, "cuda"), asked(2000), room_nbytes=2**40) is None


def test_lanes_that_may_multiply_in_fp32_keep_buffers() -> None:
    assert with_buffers(FOOTPRINT, None) == FOOTPRINT
    assert with_buffers(FOOTPRINT, 8).lane_nbytes == LANE_NBYTES
