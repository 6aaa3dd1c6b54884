"""Parquet as training data, where pyarrow is installed, and what is said where it is not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from training_data_files import turn

from penstock.memory.errors import UsageError
from penstock.runtime.training.data.rows import ChatRow, PairRow, TextRow
from penstock.runtime.training.data.sources import Located, open_source


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=300)
    return path


def read(path: Path) -> list[Located]:
    return list(open_source(path).rows())


def test_without_pyarrow_its_name_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"needs pyarrow, which is not installed: `pip install 'penstock\[data\]'`"):
        open_source(path)


def test_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", [{"text": f"text {number}", "id": number} for number in range(1000)])
    source = open_source(path)
    found = list(source.rows())
    assert [(each.line, each.offset) for each in found] == [(number + 1, number) for number in range(1000)]
    assert [list(each.row.pieces) for each in found if isinstance(each.row, TextRow)] == [
        [f"text {number}"] for number in range(1000)
    ]
    assert source.consumed_nbytes == path.stat().st_size


def test_pairs_and_conversations(tmp_path: Path) -> None:
    (pair,) = read(write(tmp_path / "pairs.parquet", [{"prompt": "p", "response": "r"}]))
    assert pair.row == PairRow(prompt="p", response="r")
    turns = [turn("user", "q"), {**turn("assistant", "a"), "name": "x"}]
    (chat,) = read(write(tmp_path / "chats.parquet", [{"messages": turns}]))
    assert chat.row == ChatRow(messages=tuple(turns)), "keys that only other messages have are left out"


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", [{"text": "a"}, {"text": ""}])
    with pytest.raises(UsageError, match=r'data\.parquet, row 2: "text" is empty'):
        read(path)
    path = write(tmp_path / "null.parquet", [{"text": "a"}, {"text": None}])
    with pytest.raises(UsageError, match=r"row 2: nothing to learn"):
        read(path)
    path = write(tmp_path / "other.parquet", [{"content": "a", "tools": "b"}])
    with pytest.raises(UsageError, match="has the columns content, tools: name them text"):
        read(path)


def test_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", [{"text": f"text {number}"} for number in range(1000)])
    good = path.read_bytes()
    for content in (b"", b"PAR1", good[:-1], b"PAR1" + b"\xff" * 100 + good[104:]):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"no parquet file that can be read|is damaged"):
            read(path)
