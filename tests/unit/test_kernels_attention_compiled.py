"""Attention by compiled functions, against double precision, and against what is computed without a compiler."""

from __future__ import annotations

import builtins
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from penstock.kernels import attention_compiled, attention_partial, machine_code
from penstock.kernels.attention_compiled import Shape, attend, prepare
from penstock.kernels.attention_merge import merge
from penstock.kernels.attention_wide import Widening

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.fixture
def compiler() -> None:
    if not machine_code.available():
        pytest.skip("llvmlite is not installed, or torch has no OpenMP library of GCC's kind")


@pytest.fixture
def forgotten(compiler: None) -> Iterator[None]:
    """What is known about compilers and functions is found out anew."""

    def forget() -> None:
        attention_compiled.forget()
        for known in (machine_code.available, machine_code._parallel, machine_code.converts_fp16):
            known.cache_clear()

    forget()
    yield
    forget()


def made(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def of_cache(
    blocks: int, heads: int, tokens: int, dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values between other things, which are NaN; addresses are those of halves, and no rounder."""
    slots = torch.full((blocks, heads, tokens + 5, dim + value_dim + 3), float("nan"), dtype=dtype)
    keys, values = slots[:, :, 2 : tokens + 2, 1 : dim + 1], slots[:, :, 4 : tokens + 4, dim + 2 : dim + value_dim + 2]
    keys.copy_(made(*keys.shape, dtype=dtype, seed=1))
    values.copy_(made(*values.shape, dtype=dtype, seed=2))
    return keys, values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256)])
def test_it_equals_the_reference(dtype: torch.dtype, rows: int, dim: int, value_dim: int) -> None:
    """Blocks of fewer tokens than a register has places, of a tile, of one more, and of several."""
    for tokens in (1, 7, 64, 65, 200):
        keys, values = of_cache(5, 3, tokens, dim, value_dim, dtype)
        for joined in (False, True):
            query = made(1 if joined else 5, 3, rows, dim, dtype=dtype, seed=3)
            found = attend(query, keys, values, scale=dim**-0.5, joined=joined)
            assert found is not None
            wide = query.expand(5, -1, -1, -1)
            expected = attention_partial.reference(wide, keys, values, scale=dim**-0.5)
            if joined:
                found, expected = merge(*found), merge(*expected)
            torch.testing.assert_close(found[0], expected[0], atol=2e-6, rtol=2e-6)
            torch.testing.assert_close(found[1], expected[1], atol=4e-6, rtol=1e-6)


def test_great_scores_and_those_that_grow_from_tile_to_tile() -> None:
    """Scores of hundreds: exponentials of most are 0, and what was seen before shrinks to nothing, or by little."""
    for growth in (-3.0, -0.01, 0.0, 0.01, 3.0):
        keys, values = made(2, 2, 300, 64), made(2, 2, 300, 64, seed=1)
        query = made(2, 2, 4, 64, seed=2)
        keys = (keys * (1 + growth * torch.arange(300)[:, None] / 100)).to(torch.bfloat16)
        found = attend(query, keys, values, scale=1.0, joined=False)
        assert found is not None
        expected = attention_partial.reference(query, keys, values, scale=1.0)
        torch.testing.assert_close(found[0], expected[0], atol=5e-5, rtol=5e-5)  # fp32 has 3e-5 of a score of 300
        torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-6)


@pytest.mark.usefixtures("every_core")
def test_threads_divide_heads_and_blocks_and_change_no_bit() -> None:
    keys, values = of_cache(41, 3, 64, 64, 64, torch.bfloat16)
    query = made(41, 3, 2, 64)
    found = attend(query, keys, values, scale=0.125, joined=False)
    together = attend(query[:1], keys, values, scale=0.125, joined=True)
    assert found is not None
    assert together is not None
    for block in range(41):
        one = attend(query[block, None], keys[block, None], values[block, None], scale=0.125, joined=False)
        assert one is not None
        assert torch.equal(one[0][0], found[0][block])
        assert torch.equal(one[1][0], found[1][block])
    out, lse = merge(*together)
    expected = merge(*attention_partial.reference(query[:1].expand(41, -1, -1, -1), keys, values, scale=0.125))
    torch.testing.assert_close(out, expected[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse, expected[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("what", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["keys", "values", "query"])
def test_what_is_not_a_number_goes_where_it_goes_without_a_compiler(
    what: float, where: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One element in one head, of the first tile or of the last one."""
    tensors = {"query": made(1, 2, 3, 64).abs(), "keys": made(1, 2, 150, 64, seed=1), "values": made(1, 2, 150, 64)}
    tensors[side][0, 1, 0 if where == "first" else -1, 5] = what
    query, keys, values = tensors.values()
    found = attend(query, keys, values, scale=0.1, joined=False)
    assert found is not None
    monkeypatch.setattr(attention_compiled, "attend", lambda *args, **kwargs: None)
    expected = Widening().each(query, keys, values, scale=0.1)
    for result, other in zip(found, expected, strict=True):
        torch.testing.assert_close(result, other, atol=2e-6, rtol=2e-6, equal_nan=True)
    assert found[0][0, 0].isfinite().all(), "the other head"


def test_no_score_above_minus_infinity_is_no_softmax() -> None:
    """Tile by tile: what counts for nothing at first is not in the way of what comes; and where nothing comes, NaN."""
    query, keys, values = made(1, 2, 2, 64).abs(), made(1, 2, 128, 64, seed=1), made(1, 2, 128, 64, seed=2)
    keys[0, 0, :64, 0] = float("-inf")
    keys[0, 1, :, 0] = float("-inf")
    found = attend(query, keys, values, scale=0.125, joined=False)
    assert found is not None
    expected = attention_partial.reference(query, keys[:, :, 64:], values[:, :, 64:], scale=0.125)
    torch.testing.assert_close(found[0][:, 0], expected[0][:, 0], atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(found[1][:, 0], expected[1][:, 0], atol=2e-6, rtol=2e-6)
    assert found[0][:, 1].isnan().all()
    assert found[1][:, 1].isnan().all()


def test_what_is_not_compiled_for() -> None:
    keys, values = made(2, 2, 8, 64), made(2, 2, 8, 64)
    query = made(2, 2, 1, 64)
    assert attend(query, keys, values, scale=1.0, joined=False) is not None
    assert attend(query.float(), keys, values, scale=1.0, joined=False) is None, "of two dtypes"
    assert attend(query, keys, values.mT.contiguous().mT, scale=1.0, joined=False) is None, "values by channel"
    narrow = [tensor[..., :40] for tensor in (query, keys, values)]
    assert attend(*narrow, scale=1.0, joined=False) is None, "40 is no multiple of 16"
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (query, keys, values)]
        assert attend(*fakes, scale=1.0, joined=False) is None, "they have no addresses"
    wide = [tensor.float() for tensor in (query, keys, values)]
    assert attend(*wide, scale=1.0, joined=False) is None, "nothing to widen"


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("missing", ["llvmlite", "threads", "code"])
def test_without_a_compiler_pieces_are_widened(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    query, keys, values = made(1, 2, 2, 64), made(5, 2, 40, 64, seed=1), made(5, 2, 40, 64, seed=2)

    def refuses(*args: Any, **kwargs: Any) -> Any:
        raise AttributeError("undefined symbol: GOMP_parallel") if missing == "threads" else RuntimeError("not today")

    if missing == "llvmlite":
        real = builtins.__import__

        def imported(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.partition(".")[0] == "llvmlite":
                raise ModuleNotFoundError("No module named 'llvmlite'")
            return real(name, *args, **kwargs)

        for name in [name for name in sys.modules if name.partition(".")[0] == "llvmlite"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(builtins, "__import__", imported)
    elif missing == "threads":
        monkeypatch.setattr(machine_code, "_parallel", refuses)
    else:
        monkeypatch.setattr(machine_code, "compiled", refuses)
    with caplog.at_level(logging.INFO):
        assert attend(query, keys, values, scale=0.125, joined=True) is None
        found = merge(*Widening().joined(query, keys, values, scale=0.125))
    expected = merge(*attention_partial.reference(query.expand(5, -1, -1, -1), keys, values, scale=0.125))
    torch.testing.assert_close(found[0], expected[0], atol=2e-6, rtol=2e-6)
    assert len(caplog.records) == 1, "said once"


@pytest.mark.usefixtures("forgotten")
def test_where_no_thread_can_be_started_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(attention_compiled.threading.Thread, "start", refuses)
        assert attend(made(1, 2, 2, 64), made(1, 2, 9, 64), made(1, 2, 9, 64), scale=1.0, joined=True) is None


@pytest.mark.usefixtures("forgotten")
def test_a_function_is_compiled_once_ahead_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    real = machine_code.compiled
    monkeypatch.setattr(machine_code, "compiled", lambda *args: built.append(1) or real(*args))
    shape = Shape(dtype=torch.bfloat16, dim=32, value_dim=16, rows=2)
    Widening.expect(shape.dtype, dim=32, value_dim=16, rows=2)
    assert prepare(shape) is prepare(shape)
    assert attend(made(1, 2, 2, 32), made(1, 2, 9, 32), made(1, 2, 9, 16), scale=1.0, joined=True) is not None
    assert built == [1]
    Widening.expect(torch.float32, dim=32, value_dim=16, rows=2)
    Widening.expect(torch.bfloat16, dim=32, value_dim=16, rows=17)
    assert len(attention_compiled._functions) == 1, "what is not known, and many queries, are left to torch"


def test_a_child_that_is_forked_meanwhile_compiles_by_itself(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    begun, go = threading.Event(), threading.Event()
    parent, plain = os.getpid(), attention_compiled._compiled

    def held(shape: Shape) -> int | None:
        if os.getpid() == parent:
            begun.set()
            assert go.wait(60)
        return plain(shape)

    monkeypatch.setattr(attention_compiled, "_compiled", held)
    shape = Shape(dtype=torch.bfloat16, dim=16, value_dim=16, rows=1)
    pending = prepare(shape)
    assert begun.wait(60)
    child = os.fork()
    if not child:
        try:
            os._exit(0 if prepare(shape).result(timeout=60) else 1)
        finally:
            os._exit(2)
    try:
        assert not pending.done()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        go.set()
    assert pending.result(timeout=60)
