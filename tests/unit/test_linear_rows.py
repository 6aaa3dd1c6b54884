"""Products in pieces of rows: equal to the whole, and a probe that foretells where bits differ."""

import pytest
import torch

from penstock.kernels.linear_rows import linear_piece, reference, splits_exactly
from penstock.kernels.revealing import reveal_in_operand, reveal_in_weight, revealing_columns

pytestmark = pytest.mark.usefixtures("every_core")

SKEWS = (0, 4)


def pieces_of(weight: torch.Tensor, rows: int) -> list[torch.Tensor]:
    return list(weight.split(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (3, 8), (2, 5, 8)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("into", [True, False])
def test_pieces_make_the_whole(shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool, into: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(13, 8).to(dtype)
    bias = torch.randn(13).to(dtype) if with_bias else None
    pieces = pieces_of(weight, 4)
    whole = reference(x, pieces, bias)
    out = torch.full_like(whole, float("nan")) if into else None
    parts, start = [], 0
    for piece in pieces:
        parts.append(linear_piece(x, piece, bias, start, out))
        start += len(piece)
    got = out if out is not None else torch.cat(parts, dim=-1)
    torch.testing.assert_close(got, whole)
    slow = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(whole.double(), slow, rtol=0.02, atol=0.1 if dtype == torch.bfloat16 else 1e-4)


def really(like: torch.Tensor, rows: int, piece_rows: int, skew: int, requires_grad: bool) -> bool:
    """What the probe foretells, with a weight that is really there."""
    columns, size = like.shape[-1], like.element_size()
    store = torch.empty(rows * columns * size + 128, dtype=torch.uint8)
    start = -store.data_ptr() % 64 + skew
    weight = store[start : start + rows * columns * size].view(like.dtype).view(rows, columns)
    generator = torch.Generator().manual_seed(1)
    weight.copy_(torch.randn(rows, columns, generator=generator))
    x = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    x.copy_(torch.randn(like.shape, generator=generator))
    huge, away = revealing_columns(columns, generator)
    reveal_in_operand(x, huge, away)
    reveal_in_weight(weight, huge, away)
    with torch.no_grad():
        whole = torch.nn.functional.linear(x, weight.detach().requires_grad_(requires_grad))
        parts = [
            torch.nn.functional.linear(x, p.detach().requires_grad_(requires_grad)) for p in weight.split(piece_rows)
        ]
        return torch.equal(torch.cat(parts, dim=-1), whole)


CASES = [
    (torch.float32, (1, 1, 256), 2048, 512),
    (torch.float32, (1, 1, 1024), 3000, 1000),
    (torch.float32, (1, 1000), 999, 333),
    (torch.float32, (1, 63), 1001, 7),
    (torch.float32, (1, 65), 4097, 1),
    (torch.float32, (4, 128), 1000, 100),
    (torch.bfloat16, (1, 1, 256), 4096, 1024),
    (torch.bfloat16, (1, 1, 256), 4001, 64),
    (torch.float32, (1, 100), 3000, 3000),
    (torch.float64, (2, 33), 500, 64),
]


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize(("dtype", "shape", "rows", "piece"), CASES)
def test_the_probe_says_what_a_real_weight_shows(
    dtype: torch.dtype, shape: tuple[int, ...], rows: int, piece: int, skew: int
) -> None:
    if skew % dtype.itemsize:
        skew = dtype.itemsize
    like = torch.empty(shape, dtype=dtype)
    for requires_grad in (False, True):
        foretold = splits_exactly(like, rows, piece, skew=skew, requires_grad=requires_grad)
        shown = really(like, rows, piece, skew, requires_grad)
        assert not (foretold and not shown), "the probe promised bits that a real weight does not give"
        assert foretold == shown


def test_some_odd_pieces_differ_and_the_probe_sees_it() -> None:
    found = {}
    for columns in (63, 100, 257, 1000):
        for piece in (1, 3, 7, 33):
            like = torch.empty(1, columns)
            shown = really(like, 1001, piece, 0, False)
            found[columns, piece] = shown
            assert splits_exactly(like, 1001, piece) == shown
    if all(found.values()):
        pytest.skip("this library sums alike at every number of rows tried")


def test_strided_operands_are_probed_as_they_are() -> None:
    base = torch.empty(4, 6, 128)
    for like in (base[:, -1:, :], base[:, -1, :], base.transpose(0, 1)):
        shown = really(like, 1000, 250, 0, False)
        assert splits_exactly(like, 1000, 250) == shown


def test_an_expanded_operand_can_be_probed() -> None:
    assert splits_exactly(torch.empty(1, 64).expand(4, 64), 512, 128) in (True, False)


def test_the_probe_takes_no_memory_to_speak_of() -> None:
    with open("/proc/self/statm") as statm:
        before = int(statm.read().split()[1])
    splits_exactly(torch.empty(1, 2048, dtype=torch.bfloat16), 1 << 17, 1 << 14)  # a weight of 512 MiB
    with open("/proc/self/statm") as statm:
        after = int(statm.read().split()[1])
    assert (after - before) * 4096 < 64 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_revealing_operands_tell_orders_of_summation_apart_that_random_ones_hide(dtype: torch.dtype) -> None:
    """The same terms summed in fp32 from the first to the last and back, and rounded; exact sums are the same."""
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(1, 64, generator=generator).to(dtype), torch.randn(256, 64, generator=generator).to(dtype)

    def both_ways() -> tuple[torch.Tensor, torch.Tensor]:
        terms = x.float() * weight.float()
        there, back = torch.zeros(len(terms)), torch.zeros(len(terms))
        for column in range(terms.shape[1]):
            there, back = there + terms[:, column], back + terms[:, -1 - column]
        return there.to(dtype), back.to(dtype)

    hidden = (both_ways()[0] == both_ways()[1]).float().mean()
    huge, away = revealing_columns(64, generator)
    reveal_in_operand(x, huge, away)
    reveal_in_weight(weight, huge, away)
    assert torch.isfinite(x.float()).all()
    shown = (both_ways()[0] == both_ways()[1]).float().mean()
    assert shown < 0.5
    assert hidden > 0.9 or dtype == torch.float32
    small = [c for c in range(64) if c not in {*huge.tolist(), *away.tolist()}]
    exact = (x.double() * weight.double()).sum(1)
    assert torch.allclose(exact, (x.double() * weight.double())[:, small].sum(1), rtol=0, atol=1e-6)


def test_expanded_operands_are_written_once() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 1, 16, generator=generator).expand(4, 1, 16)
    huge, away = revealing_columns(16, generator)
    reveal_in_operand(x, huge, away)
    assert torch.equal(x[3, 0, huge], x[0, 0, away])
    assert x[0, 0, huge].abs().min() >= 2**18
