"""Partial attention and its merging, against double precision."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from penstock.kernels import attention_compiled, attention_merge, attention_partial, attention_wide
from penstock.kernels.attention_merge import EMPTY, Merging, merge
from penstock.kernels.attention_partial import partial
from penstock.kernels.attention_wide import ELEMENTS, Widening

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are widened by torch."""
    monkeypatch.setattr(attention_compiled, "attend", lambda *args, **kwargs: None)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rows", [1, 4, 33])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 80), (192, 128), (256, 256)])
@pytest.mark.parametrize("tokens", [1, 7, 64, 700])
def test_a_part_equals_the_reference(dtype: torch.dtype, rows: int, dim: int, value_dim: int, tokens: int) -> None:
    query = made(2, 3, rows, dim, dtype=dtype)
    keys, values = made(2, 3, tokens, dim, dtype=dtype, seed=1), made(2, 3, tokens, value_dim, dtype=dtype, seed=2)
    out, lse = partial(query, keys, values, scale=dim**-0.5)
    expected, expected_lse = attention_partial.reference(query, keys, values, scale=dim**-0.5)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected_lse, atol=4e-6 if dtype is torch.float32 else 1e-2, rtol=1e-5)


def test_blocks_and_expanded_queries_are_read_where_they_lie() -> None:
    slots = made(5, 2, 3, 16, 32)
    query = made(1, 3, 4, 32, seed=3).expand(5, -1, -1, -1)
    out, _ = partial(query, slots[:, 0], slots[:, 1], scale=0.2)
    expected, _ = attention_partial.reference(query, slots[:, 0], slots[:, 1], scale=0.2)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind", ["bool", "float", "capped"])
@pytest.mark.parametrize("heads", [1, 3])
def test_masks(kind: str, heads: int) -> None:
    query, keys, values = made(2, 3, 4, 32), made(2, 3, 40, 32, seed=1), made(2, 3, 40, 32, seed=2)
    seen = torch.rand(2, heads, 4, 40, generator=torch.Generator().manual_seed(5)) < 0.5
    seen[0, :, 2] = False
    mask = seen if kind == "bool" else torch.where(seen, made(2, heads, 4, 40, seed=6), torch.finfo(torch.float32).min)
    cap = 2.0 if kind == "capped" else None
    out, lse = partial(query, keys, values, scale=1.0, mask=mask, cap=cap)
    expected, expected_lse = attention_partial.reference(query, keys, values, scale=1.0, mask=mask, cap=cap)
    torch.testing.assert_close(out, expected, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(lse, expected_lse, atol=3e-6, rtol=3e-6)
    assert (out[0, :, 2] == 0).all()
    assert (lse[0, :, 2] == EMPTY).all()


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (192, 128)])
@pytest.mark.parametrize("same", [True, False])
def test_halves_that_are_widened_lose_nothing(
    dtype: torch.dtype, rows: int, dim: int, value_dim: int, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven blocks, three at a time, between other things in their slots; as exact as fp32, not as the halves."""
    monkeypatch.setattr(attention_wide, "ELEMENTS", 3 * 2 * 40 * (dim + value_dim) + 5)
    slots = made(7, 2, 48, dim + value_dim + 3, dtype=dtype)
    keys, values = slots[:, :, 3:43, :dim], slots[:, :, 3:43, dim : dim + value_dim]
    widening = Widening()
    for _ in range(2):
        query = made(1 if same else 7, 2, rows, dim, dtype=dtype, seed=1)
        out, lse = (widening.joined if same else widening.each)(query, keys, values, scale=dim**-0.5)
        if same:
            assert len(out) == 3
            out, lse = merge(out, lse)
        expected, expected_lse = attention_partial.reference(query.expand(7, -1, -1, -1), keys, values, scale=dim**-0.5)
        if same:
            expected, expected_lse = attention_merge.reference(expected, expected_lse)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(lse, expected_lse, atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("compiles", [True, False])
def test_widening_does_not_depend_on_the_defaults_of_a_program(compiles: bool, request: pytest.FixtureRequest) -> None:
    """Neither on torch's default dtype, nor on the mode in which it was used first."""
    if not compiles:
        request.getfixturevalue("no_compiler")
    query, keys, values = (made(1, 2, 2, 64, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    widening = Widening()
    expected, _ = attention_partial.reference(query, keys, values, scale=0.1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            widening.each(query, keys, values, scale=0.1)
        for out, _ in (widening.each(query, keys, values, scale=0.1), widening.joined(query, keys, values, scale=0.1)):
            torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)
    finally:
        torch.set_default_dtype(before)
    assert not Widening.suits(query.requires_grad_(), keys, values), "what backward needs would be written over"


def test_what_is_widened() -> None:
    def suits(rows: int, tokens: int, dtype: torch.dtype) -> bool:
        return Widening.suits(made(1, 2, rows, 64, dtype=dtype), *[made(1, 2, tokens, 64, dtype=dtype)] * 2)

    most = ELEMENTS // (2 * 128)
    assert suits(16, most, torch.bfloat16)
    assert not suits(17, 64, torch.bfloat16), "many queries"
    assert not suits(1, most + 1, torch.bfloat16), "one block is too large"
    assert not suits(1, 64, torch.float32), "wide already"


def test_no_tokens_give_nothing() -> None:
    out, lse = partial(made(1, 2, 3, 8), made(1, 2, 0, 8), made(1, 2, 0, 8), scale=1.0)
    assert out.shape == (1, 2, 3, 8)
    assert (out == 0).all()
    assert (lse == EMPTY).all()


@pytest.mark.parametrize("cuts", [(5,), (1, 2, 60), (64,)])
def test_merged_parts_equal_the_whole(cuts: tuple[int, ...]) -> None:
    query, keys, values = made(1, 2, 4, 64), made(1, 2, 64, 64, seed=1), made(1, 2, 64, 64, seed=2)
    bounds = [0, *cuts, 64]
    parts = [partial(query, keys[:, :, a:b], values[:, :, a:b], scale=0.125) for a, b in pairwise(bounds)]
    out, lse = merge(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))
    expected, expected_lse = attention_partial.reference(query, keys, values, scale=0.125)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse, expected_lse, atol=1e-6, rtol=1e-6)


def test_merging_equals_its_reference_with_empty_parts_and_great_numbers() -> None:
    outs, lses = made(6, 5, 8), made(6, 5, seed=1) * 200
    lses[2], lses[:, 3], lses[4, 1] = EMPTY, EMPTY, EMPTY
    out, lse = merge(outs, lses)
    expected, expected_lse = attention_merge.reference(outs, lses)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse)
    assert (out[3] == 0).all()
    assert lse[3] == EMPTY
    running = Merging.of((5, 8), torch.device("cpu"))
    for part, log in zip(outs, lses, strict=True):
        running.add(part, log)
    torch.testing.assert_close(running.out, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(running.lse, expected_lse)


def test_merging_some_rows_leaves_the_others() -> None:
    running = Merging.of((3, 2), torch.device("cpu"))
    running.add(torch.ones(2, 2), torch.zeros(2), torch.tensor([0, 2]))
    running.add(torch.zeros(1, 2), torch.zeros(1), torch.tensor([2]))
    assert running.out.tolist() == [[1, 1], [0, 0], [0.5, 0.5]]
    assert running.lse.tolist() == [0, EMPTY, pytest.approx(math.log(2))]
