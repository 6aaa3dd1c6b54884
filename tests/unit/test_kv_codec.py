"""Keys and values in few bits, against a slow reference, element by element."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.kv_codec import BITS, decode, encode, width


def slow(row: list[float], bits: int) -> tuple[list[float], float]:
    """What is left of values that share a range, and half a step of it."""
    low, high, top = min(row), max(row), 2**bits - 1
    step = (high - low) / top
    return [low + (round((x - low) / step) if step else 0) * step for x in row], step / 2


@pytest.mark.parametrize("codec", list(BITS))
@pytest.mark.parametrize("dim", [1, 7, 8])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_within_half_a_step(codec: str, dim: int, axis: int, dtype: torch.dtype) -> None:
    bits = BITS[codec]
    values = torch.randn(2, 3, 11, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[..., 0] = values[..., 0] * 100 + 50  # a channel that is larger
    values[0, 0] = 3.0  # no range at all
    levels, low, step = encode(values, bits, axis)
    assert levels.dtype == torch.uint8
    assert levels.shape == (2, 3, 11, width(dim, bits))
    assert low.shape == step.shape == ((2, 3, 11) if axis == -1 else (2, 3, dim))
    found = decode(levels, low.unsqueeze(axis), step.unsqueeze(axis), bits=bits, dim=dim, dtype=torch.float32)
    rows = values.float().transpose(axis, -1).reshape(-1, values.shape[axis])
    for row, got in zip(rows.tolist(), found.transpose(axis, -1).reshape(rows.shape).tolist(), strict=True):
        expected, half = slow(row, bits)
        size = max(abs(x) for x in row)
        for x, one, other in zip(row, got, expected, strict=True):
            assert abs(one - x) <= half + 1e-6 * size
            assert abs(one - other) <= 1e-5 * size or abs(abs(one - other) - 2 * half) <= 1e-5 * size  # a tie


def test_a_large_channel_does_not_spoil_others() -> None:
    """Which is why keys have a range for each channel (KIVI)."""
    keys = torch.randn(1, 1, 64, 8, generator=torch.Generator().manual_seed(1))
    keys[..., 0] *= 1000

    def error(axis: int) -> float:
        levels, low, step = encode(keys, 4, axis)
        found = decode(levels, low.unsqueeze(axis), step.unsqueeze(axis), bits=4, dim=8, dtype=torch.float32)
        return float((found - keys)[..., 1:].abs().max())

    assert error(-2) < 0.25
    assert error(-1) > 2
