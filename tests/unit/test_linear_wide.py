"""Products of half numbers in fp32, against double precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from penstock.kernels import linear_wide
from penstock.kernels.linear_wide import DTYPES, WideLinear, reference
from penstock.runtime.widening import LANE_NBYTES, Widening, faster_of
from penstock.scheduler.curves import Curve

pytestmark = pytest.mark.usefixtures("every_core")

UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(1, 90)),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    piece=st.sampled_from([1, 4 * 90 * 16, 1 << 20]),
)
def test_products_are_within_the_rounding_that_is_stated(
    shape: tuple[int, int, int], dtype: torch.dtype, biased: bool, piece: int
) -> None:
    rows, outputs, inputs = shape
    generator = torch.Generator().manual_seed(rows * 7919 + outputs * 104729 + inputs)
    x, weight, bias = (
        torch.randn(size, generator=generator).to(dtype) for size in ((2, rows, inputs), (outputs, inputs), (outputs,))
    )
    multiply = WideLinear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_wide, "PIECE_NBYTES", piece)
        got = multiply(x, weight, bias if biased else None)
    assert multiply.nbytes <= 3 * max(piece, 4 * linear_wide.GRAIN * max(inputs, linear_wide.GRAIN))
    exact = functional.linear(x.double(), weight.double(), bias.double() if biased else None)
    summed = functional.linear(x.double().abs(), weight.double().abs(), bias.double().abs() if biased else None)
    assert got.dtype == dtype
    assert got.shape == (2, rows, outputs)
    assert ((got.double() - exact).abs() <= UNIT[dtype] * exact.abs() + (inputs + 1) * 2**-24 * summed + 2**-24).all()


def test_strided_operands_are_taken_as_they_are() -> None:
    x = torch.randn(3, 5, 32).to(torch.bfloat16)[:, -2:]
    weight = torch.randn(24, 64).to(torch.bfloat16)[:, ::2]
    assert torch.equal(WideLinear()(x, weight), WideLinear()(x.contiguous(), weight.contiguous()))
    assert (WideLinear()(x, weight) - reference(x, weight)).abs().max() <= 2**-6 * reference(x, weight).abs().max()


def test_only_products_of_many_half_rows_are_taken() -> None:
    weight, bias = torch.nn.Parameter(torch.randn(8, 16).to(torch.bfloat16), requires_grad=False), torch.zeros(8)
    many, few = torch.randn(1, 4, 16).to(torch.bfloat16), torch.randn(1, 3, 16).to(torch.bfloat16)
    with Widening(4) as mode:
        functional.linear(few, weight)
        functional.linear(many.float(), weight.float(), bias)
        torch.mm(many[0], weight.t())
        assert mode.multiplied == 0
        got = functional.linear(input=many, weight=weight, bias=bias.to(torch.bfloat16))
        assert mode.multiplied == 1
        torch.nn.Linear(16, 8, dtype=torch.bfloat16)(many)  # wants a gradient
        assert mode.multiplied == 1
    assert torch.equal(got, WideLinear()(many, weight))


def test_fp32_is_taken_from_where_it_is_never_slower() -> None:
    plain = Curve.through([(1, 10.0), (8, 4.0), (64, 0.8), (512, 0.1)])
    found = faster_of(plain, Curve.through([(8, 3.0), (64, 1.6), (512, 0.3)]))
    assert found.wide_from == 32
    assert [round(found.rates.at(x), 3) for x in (1, 8, 32, 64, 512)] == [10.0, 4.0, 1.973, 1.6, 0.3]
    assert found.rates.at(16) == pytest.approx(plain.at(16), rel=0.02)
    assert faster_of(plain, Curve.through([(8, 3.0), (64, 1.6), (512, 0.11)])).wide_from is None
    assert faster_of(plain, Curve.through([(8, 9.0), (64, 9.0), (512, 9.0)])).wide_from == 8


def test_buffers_of_a_long_prompt_are_no_larger_than_is_said() -> None:
    """3000 rows of 4096: their fp32 alone would be 48 MiB."""
    multiply = WideLinear()
    x, weight = torch.ones(3000, 4096, dtype=torch.bfloat16), torch.ones(32, 4096, dtype=torch.bfloat16)
    assert torch.equal(multiply(x, weight), torch.full((3000, 32), 4096, dtype=torch.bfloat16))
    assert multiply.nbytes <= LANE_NBYTES == 24 * 2**20


@pytest.mark.parametrize("rows", [11, 12, 48, 49])
def test_few_rows_of_wide_pieces_are_multiplied_the_other_way_round(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(*size, generator=generator).to(torch.bfloat16) for size in ((rows, 24), (600, 24)))
    bias = torch.randn(600, generator=generator).to(torch.bfloat16)
    exact = functional.linear(x.double(), weight.double(), bias.double())
    summed = functional.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    error = (WideLinear()(x, weight, bias).double() - exact).abs()
    assert (error <= 2**-8 * exact.abs() + 25 * 2**-24 * summed).all()
