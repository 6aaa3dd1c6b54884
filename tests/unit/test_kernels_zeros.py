"""Whether there is nothing but zeros: by the bits."""

import pytest
import torch

from penstock.kernels.zeros import all_zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_bit_of_any_element_counts(dtype: torch.dtype) -> None:
    values = torch.zeros(1000, dtype=dtype)
    assert all_zero(values)
    tiny = torch.finfo(dtype).smallest_normal / 2  # a number that arithmetic might flush to zero
    for at in (0, 499, 999):
        for other in (1.0, -1.0, tiny, -0.0, float("nan"), float("-inf")):
            values[at] = other
            assert not all_zero(values)
            assert all_zero(values[:at]) if at else True
        values[at] = 0
    assert all_zero(values)
