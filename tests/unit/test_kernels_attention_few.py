"""Few queries over keys of half precision, widened in pieces, against double precision."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from penstock.kernels import attention_few, attention_partial
from penstock.kernels.attention_few import few
from penstock.kernels.attention_merge import merge
from penstock.runtime.kv import attention
from penstock.runtime.kv.attention import Asked, attend
from penstock.runtime.kv.spread import Use, spans

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = {"atol": 3e-6, "rtol": 3e-6}


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[attention_few.PIECE_ELEMENTS, 700])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, and so small that blocks are cut, too."""
    monkeypatch.setattr(attention_few, "PIECE_ELEMENTS", request.param)


def joined(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.transpose(0, 1).flatten(1, 2)[None]


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (192, 128), (256, 256)])
@pytest.mark.parametrize(("blocks", "tokens"), [(1, 1), (5, 7), (3, 64)])
def test_parts_merged_equal_the_reference(
    dtype: torch.dtype, rows: int, dim: int, value_dim: int, blocks: int, tokens: int
) -> None:
    query = made(3, rows, dim, dtype=dtype)
    keys, values = (made(blocks, 3, tokens, size, dtype=dtype, seed=size + 1) for size in (dim, value_dim))
    for cap in (None, 2.0):
        out, lse = merge(*few(query, keys, values, scale=dim**-0.5, cap=cap))
        expected, expected_lse = attention_partial.reference(
            query[None], joined(keys), joined(values), scale=dim**-0.5, cap=cap
        )
        torch.testing.assert_close(out, expected[0], **TOLERANCE)
        torch.testing.assert_close(lse, expected_lse[0], **TOLERANCE)


def test_blocks_are_read_where_they_lie_and_large_scores_do_no_harm() -> None:
    slots = made(9, 2, 3, 16, 32, dtype=torch.bfloat16) * 30
    keys, values = slots[2:7, 0, :, :11], slots[2:7, 1, :, :11]
    query = made(3, 2, 32, seed=3)
    with torch.inference_mode():
        few(query, keys, values, scale=1.0)
    out, lse = merge(*few(query, keys, values, scale=1.0))
    expected, expected_lse = attention_partial.reference(query[None], joined(keys), joined(values), scale=1.0)
    torch.testing.assert_close(out, expected[0], atol=1e-3, rtol=1e-4)  # scores of hundreds have an ulp of 3e-5
    torch.testing.assert_close(lse, expected_lse[0])


@pytest.mark.parametrize(("blocks", "tokens"), [(0, 8), (4, 0)])
def test_no_keys_are_no_parts(blocks: int, tokens: int) -> None:
    out, lse = few(made(2, 3, 8), made(blocks, 2, tokens, 8), made(blocks, 2, tokens, 8), scale=1.0)
    assert (out.shape, lse.shape) == ((0, 2, 3, 8), (0, 2, 3))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    "users",
    [[(0,)] * 5, [(0, 1)] * 3 + [(0,), (1,), (1,)], [(0, 1, 2), (2,), (), (1, 2), (0,)]],
    ids=["one row", "two that part", "three"],
)
def test_rows_attend_to_what_is_theirs(
    dtype: torch.dtype, users: Sequence[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "widens", lambda _: True)
    rows, heads, group, tokens, dim = 1 + max(max(who, default=0) for who in users), 2, 3, 8, 64
    keys, values = (made(len(users), heads, tokens, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    new = [made(rows, heads, 1, dim, dtype=dtype, seed=seed) for seed in (3, 4)]
    query = made(rows, heads * group, 1, dim, dtype=dtype, seed=5)
    uses = spans([[Use(row=row, position=at * tokens) for row in who] for at, who in enumerate(users)])
    out = attend(Asked(query=query, keys=new[0], values=new[1], scale=0.125), iter([(keys, values, uses)]))
    for row in range(rows):
        mine = [at for at, who in enumerate(users) if row in who]
        both = [
            torch.cat([joined(old[mine]), one[row, None]], dim=2) for old, one in ((keys, new[0]), (values, new[1]))
        ]
        expected, _ = attention_partial.reference(query[row].view(1, heads, group, dim), *both, scale=0.125)
        tolerance = torch.finfo(dtype).eps  # of the result, which is in the queries' dtype
        torch.testing.assert_close(out[row, 0].float(), expected.view(-1, dim), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_tokens_see_those_before_them(dtype: torch.dtype) -> None:
    query = made(2, 6, 700, 64, dtype=dtype)
    keys, values = made(2, 2, 700, 64, dtype=dtype, seed=1), made(2, 2, 700, 64, dtype=dtype, seed=2)
    out = attend(Asked(query=query, keys=keys, values=values, scale=0.125), iter(()))
    seen = torch.ones(700, 700, dtype=torch.bool).tril()
    wide = [part.repeat_interleave(3, dim=1) for part in (keys, values)]
    expected, _ = attention_partial.reference(query, *wide, scale=0.125, mask=seen)
    tolerance = max(3e-6, 2 * torch.finfo(dtype).eps)  # the flash kernel multiplies weights in this dtype
    torch.testing.assert_close(out.float(), expected.transpose(1, 2), atol=tolerance, rtol=tolerance)
