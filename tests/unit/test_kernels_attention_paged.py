"""Attention to blocks by their slots, in torch and (interpreted) in Triton, against double precision."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from penstock.kernels import attention_paged, attention_partial
from penstock.kernels.attention_merge import EMPTY

LENGTHS = [0, 1, 5, 64, 65, 200]
CASES = [(16, 1, 64, 64), (64, 4, 80, 80), (64, 3, 128, 128), (32, 40, 96, 64), (64, 8, 256, 256)]
"""Tokens of a block, queries, dim, value dim."""


def made(tokens: int, queries: int, dim: int, value_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    some = torch.Generator().manual_seed(0)
    rows, blocks = len(LENGTHS), -(-max(LENGTHS) // tokens)
    arena = torch.randn(rows * blocks + 3, 2, tokens, dim + value_dim, generator=some).to(dtype)
    slots = torch.randperm(rows * blocks + 3, generator=some)[: rows * blocks].view(rows, blocks).to(torch.int32)
    query = torch.randn(rows, 2, queries, dim, generator=some).to(dtype)
    return query, arena[..., :dim], arena[..., dim:], slots, torch.tensor(LENGTHS, dtype=torch.int32)


def check(
    tokens: int, queries: int, dim: int, value_dim: int, dtype: torch.dtype = torch.float32, tolerance: float = 3e-6
) -> None:
    query, keys, values, slots, lengths = made(tokens, queries, dim, value_dim, dtype)
    out, lse = attention_paged.paged_partial(query, keys, values, slots, lengths, scale=dim**-0.5)
    for row, length in enumerate(LENGTHS):
        whole = [part[slots[row].long()].transpose(0, 1).flatten(1, 2)[None, :, :length] for part in (keys, values)]
        if not length:
            assert (out[row] == 0).all()
            assert (lse[row] == EMPTY).all()
            continue
        expected, expected_lse = attention_partial.reference(query[row, None], whole[0], whole[1], scale=dim**-0.5)
        torch.testing.assert_close(out[row], expected[0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse[row], expected_lse[0], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_found_by_their_slots(case: tuple[int, int, int, int]) -> None:
    check(*case)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_as_triton_interprets_it() -> None:
    """In a process of its own, since Triton decides at import whether it interprets."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch\n"
        "from penstock.kernels import attention_paged\n"
        "assert attention_paged._kernel() is not None\n"
        "from test_kernels_attention_paged import CASES, check\n"
        "for case in CASES: check(*case)\n"
        "check(*CASES[1], torch.float16, 4e-3)\n"  # the interpreter multiplies the bits of bf16 numbers
    )
    subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(__file__)], check=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
