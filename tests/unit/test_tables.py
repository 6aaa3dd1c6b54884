"""Tables served by rows: lookups and products against the plain functions, and how much is read."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from penstock.memory.disk import DiskEngine
from penstock.memory.errors import DiskError
from penstock.memory.layout import FileSpan, TensorSource
from penstock.runtime.tables import Piece, Table

ROWS, COLUMNS, START = 40, 24, 1237


@pytest.fixture(scope="module")
def values() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def engine() -> Iterator[DiskEngine]:
    made = DiskEngine(threads=2)
    yield made
    made.close()


def table(
    folder: Path, engine: DiskEngine, values: torch.Tensor, *, dtype: str = "F32", resident: tuple[int, ...] = ()
) -> Table:
    """The table in a file, in pieces of 16 rows, of which some are resident."""
    raw = values.numpy().tobytes()
    cut = 10 * COLUMNS * 4 + 4  # in the middle of a row
    (folder / "one").write_bytes(bytes(START) + raw[:cut])
    (folder / "two").write_bytes(raw[cut:])
    spans = (
        FileSpan(path=str(folder / "one"), offset=START, nbytes=cut),
        FileSpan(path=str(folder / "two"), offset=0, nbytes=len(raw) - cut),
    )
    used = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]

    def rows(piece: Piece) -> torch.Tensor | None:
        return values[piece.start : piece.stop].to(used) if piece.block in resident else None

    return Table(
        name="embed.weight",
        parameter=nn.Parameter(torch.zeros((), dtype=used).expand(ROWS, COLUMNS), requires_grad=False),
        source=TensorSource(shape=(ROWS, COLUMNS), dtype="F32", spans=spans),
        dtype=dtype,
        skew=16,
        pieces=[Piece(block=7 + i, start=a, stop=min(a + 16, ROWS)) for i, a in enumerate(range(0, ROWS, 16))],
        resident_rows=rows,
        engine=engine,
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.lists(st.lists(st.integers(0, ROWS - 1), min_size=3, max_size=3), max_size=5),
    dtype=st.sampled_from(["F32", "BF16"]),
    resident=st.sets(st.sampled_from([7, 8, 9])),
)
def test_lookups(
    tmp_path: Path, engine: DiskEngine, values: torch.Tensor, ids: list[list[int]], dtype: str, resident: set[int]
) -> None:
    made = table(tmp_path, engine, values, dtype=dtype, resident=tuple(resident))
    asked = torch.tensor(ids, dtype=torch.int64).view(-1, 3)
    expected = nn.functional.embedding(asked, values.to(made.parameter.dtype))
    assert torch.equal(made.lookup(asked), expected)
    read = {row for row in asked.flatten().tolist() if 7 + row // 16 not in resident}
    assert (made.rows_read_nbytes > 0) == bool(read)
    assert made.rows_read_nbytes <= 3 * 4096 * len(read)  # each distinct row once


@pytest.mark.parametrize("bad", [-1, ROWS, -(2**40)])
def test_rows_that_are_not_there(tmp_path: Path, engine: DiskEngine, values: torch.Tensor, bad: int) -> None:
    made = table(tmp_path, engine, values)
    with pytest.raises(IndexError, match=f"has {ROWS} rows; asked for row {bad}$"):
        made.lookup(torch.tensor([3, bad, 5]))


def test_a_truncated_table(tmp_path: Path, engine: DiskEngine, values: torch.Tensor) -> None:
    made = table(tmp_path, engine, values)
    os.truncate(tmp_path / "two", 50)
    with pytest.raises(DiskError, match="truncated"):
        made.lookup(torch.tensor([39]))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_whole_table(tmp_path: Path, engine: DiskEngine, values: torch.Tensor, dtype: str) -> None:
    made = table(tmp_path, engine, values, dtype=dtype)
    whole = made.whole()
    assert torch.equal(whole, values.to(made.parameter.dtype))
    assert whole.data_ptr() % 64 == made.skew


@pytest.mark.parametrize("with_bias", [True, False])
def test_products(tmp_path: Path, engine: DiskEngine, values: torch.Tensor, with_bias: bool) -> None:
    made = table(tmp_path, engine, values)
    x, bias = torch.randn(2, 3, COLUMNS), torch.randn(ROWS) if with_bias else None
    lent: list[int] = []

    def lend(block: int) -> tuple[torch.Tensor, Callable[[], None]]:
        assert not lent, "one piece at a time"
        lent.append(block)
        piece = made.pieces[block - 7]
        return values[piece.start : piece.stop], lent.clear

    torch.testing.assert_close(made.product(x, bias, lend), nn.functional.linear(x, values, bias))
    assert not lent


def test_pieces_are_given_back_when_the_product_fails(tmp_path: Path, engine: DiskEngine, values: torch.Tensor) -> None:
    made = table(tmp_path, engine, values)
    back: list[int] = []
    with pytest.raises(RuntimeError):
        made.product(torch.randn(2, COLUMNS + 1), None, lambda block: (values[:16], lambda: back.append(block)))
    assert back == [7]


def test_splitting_is_asked_once_per_operand(
    tmp_path: Path, engine: DiskEngine, values: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def probe(x: torch.Tensor, rows: int, piece: int, **options: object) -> bool:
        assert (rows, piece) == (ROWS, 16)
        asked.append(tuple(x.shape))
        return len(asked) > 1

    monkeypatch.setattr("penstock.runtime.tables.splits_exactly", probe)
    made = table(tmp_path, engine, values)
    assert [made.splits(torch.empty(n, COLUMNS)) for n in (1, 1, 2, 2, 0)] == [False, False, True, True, True]
    assert asked == [(1, COLUMNS), (2, COLUMNS)]
    made.pieces = []
    assert not made.splits(torch.empty(5, COLUMNS))
