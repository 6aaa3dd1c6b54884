"""Products sample by sample: the bits of torch's own path, without its copies of the weight."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from penstock.kernels.linear_rows import linear_piece, splits_exactly
from penstock.kernels.linear_samples import copies_agree, copies_weight, is_laid_flat, linear_by_sample

pytestmark = pytest.mark.usefixtures("every_core")


def last_of(batch: int, kept: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The last positions of sequences of seven."""
    return torch.randn(batch, 7, columns, generator=torch.Generator().manual_seed(1)).to(dtype)[:, -kept:]


def weight_of(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)).bfloat16()


def test_it_is_known_what_torch_lays_flat() -> None:
    whole = torch.randn(3, 7, 8)
    assert is_laid_flat(whole, None)
    assert is_laid_flat(whole[:2], None)
    assert not is_laid_flat(whole[:, -1:], None)
    assert not is_laid_flat(whole[:1, -1:], None), "the stride of a dimension of 1 counts"
    assert is_laid_flat(whole[:1, -1:], torch.zeros(3)), "but not where there is a bias"


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("batch", "kept", "rows", "columns"), [(1, 1, 999, 64), (5, 1, 2048, 128), (3, 4, 500, 256)])
def test_samples_have_the_bits_of_torch(batch: int, kept: int, rows: int, columns: int, with_bias: bool) -> None:
    x, weight = last_of(batch, kept, columns), weight_of(rows, columns)
    bias = torch.randn(rows).bfloat16() if with_bias else None
    whole = functional.linear(x, weight, bias)
    transposed = weight.t().expand(batch, -1, -1).contiguous()
    if not copies_agree(x, transposed, rows // 3):
        pytest.skip("this CPU adds up otherwise in a batched product")
    if copies_weight(x, weight, bias):
        assert torch.equal(linear_by_sample(x, weight, bias), whole)
    out = torch.full_like(whole, float("nan"))
    for start in range(0, rows, rows // 3):
        linear_piece(x, weight[start : start + rows // 3], bias, start, out)
    assert torch.equal(out, whole)


def test_a_weight_is_copied_only_where_torch_copies_it() -> None:
    weight = weight_of(16, 8)
    assert copies_weight(last_of(2, 1, 8), weight, None)
    assert not copies_weight(last_of(2, 7, 8), weight, None)  # flat
    assert not copies_weight(last_of(2, 1, 8, torch.float32), weight, None)  # MKL takes a transposed operand
    assert not copies_weight(last_of(2, 1, 8), weight.clone().requires_grad_(), None)  # folded
    assert not copies_weight(last_of(2, 1, 8)[:, 0], weight, None)  # a matrix
    assert not copies_weight(last_of(2, 1, 8)[:0], weight, None)  # nothing


def test_gradients_go_through_torchs_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("penstock.kernels.linear_rows.linear_by_sample")
    weight = weight_of(40, 32)
    ours, theirs = (last_of(3, 7, 32).clone().requires_grad_() for _ in range(2))
    for x, product in ((ours, linear_piece), (theirs, lambda x, piece, *_: functional.linear(x, piece))):
        parts = [product(x[:, -1:], weight[i : i + 20], None, i, None) for i in (0, 20)]
        torch.cat(parts, dim=-1).float().square().sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    with torch.no_grad(), pytest.raises(NameError):
        linear_piece(ours[:, -1:], weight, None, 0, None)


def test_a_probe_of_many_samples_takes_no_memory_to_speak_of() -> None:
    like = torch.empty(16, 3, 1024, dtype=torch.bfloat16)[:, -1:]
    with open("/proc/self/status") as status:
        before = peak_kib(status.read())
    splits_exactly(like, 1 << 16, 1 << 13)  # 16 copies of 128 MiB
    with open("/proc/self/status") as status:
        after = peak_kib(status.read())
    assert after - before < 100 << 10


def peak_kib(status: str) -> int:
    """Anonymous memory; what is mapped again and again is not in it."""
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
