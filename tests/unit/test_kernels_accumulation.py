"""Sums of gradients in fp32: the bits of `total.add_(grad.float())`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.kernels.accumulation import accumulate, reference
from penstock.kernels.optimizer import GRADIENT_DTYPES
from penstock.kernels.scratch import GRAIN, SUBCHUNK, Scratch

pytestmark = pytest.mark.usefixtures("every_core")


@given(
    count=st.integers(0, 500),
    kinds=st.lists(st.sampled_from(GRADIENT_DTYPES), min_size=1, max_size=5),
    edge=st.integers(0, 500),
    seed=st.integers(0, 2**32),
)
def test_as_torch_adds(count: int, kinds: list[torch.dtype], edge: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scratch = Scratch.of(GRAIN)
    got, wanted = torch.full((count,), float("nan")), torch.full((count,), float("nan"))
    edge = min(edge, count)
    for index, dtype in enumerate(kinds):
        grad = (torch.randn(count, generator=generator) * 10 ** (3 * torch.randn(count, generator=generator))).to(dtype)
        grad[::7] = -0.0
        reference(wanted, grad, first=index == 0)
        for piece in (slice(0, edge), slice(edge, count)):
            accumulate(got[piece], grad[piece], first=index == 0, scratch=scratch)
    assert torch.equal(got.view(torch.int32), wanted.view(torch.int32))


def test_more_than_a_sub_chunk() -> None:
    count, scratch = 2 * SUBCHUNK + 5, Scratch.of()
    total, grads = torch.empty(count), [torch.randn(count).bfloat16() for _ in range(2)]
    for index, grad in enumerate(grads):
        accumulate(total, grad, first=index == 0, scratch=scratch)
    assert torch.equal(total, grads[0].float() + grads[1].float())


@pytest.mark.parametrize(
    ("total", "grad", "message"),
    [
        (torch.zeros(4).bfloat16(), torch.zeros(4), "torch.float32 into torch.bfloat16: sums are fp32"),
        (torch.zeros(4), torch.zeros(4).double(), "torch.float64 into torch.float32"),
        (torch.zeros(4), torch.zeros(5), r"a gradient \[5\] into a sum \[4\]"),
        (torch.zeros(2, 2), torch.zeros(2, 2), "both must be flat, contiguous and as long"),
        (torch.zeros(8)[::2], torch.zeros(4), "both must be flat, contiguous and as long"),
    ],
)
def test_what_does_not_fit(total: torch.Tensor, grad: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accumulate(total, grad, first=False, scratch=Scratch.of(GRAIN))
