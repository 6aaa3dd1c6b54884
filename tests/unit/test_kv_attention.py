"""Attention over blocks and new tokens, in each dtype, against double precision."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from penstock.kernels import attention_partial
from penstock.runtime.kv.attention import Asked, attend
from penstock.runtime.kv.spread import Use, spans

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def joined(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.transpose(0, 1).flatten(1, 2)[None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    "users",
    [[(0,)] * 5, [(0, 1)] * 3 + [(0,), (1,), (1,)], [(0, 1, 2), (2,), (), (1, 2), (0,)]],
    ids=["one row", "two that part", "three"],
)
def test_rows_attend_to_what_is_theirs(dtype: torch.dtype, group: int, users: Sequence[tuple[int, ...]]) -> None:
    rows, heads, tokens, dim = 1 + max(max(who, default=0) for who in users), 2, 8, 64
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
        tolerance = max(3e-6, 2 * torch.finfo(dtype).eps)  # weights and results are in the queries' dtype
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
