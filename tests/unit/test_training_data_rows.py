"""Rows of training data: what is read, and how what is wrong is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.errors import UsageError
from penstock.runtime.training.data import sources
from penstock.runtime.training.data.pieces import cut
from penstock.runtime.training.data.rows import ChatRow, PairRow, TextRow, parse_row
from penstock.runtime.training.data.sources import Located, open_source

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}


def read(path: Path) -> list[Located]:
    return list(open_source(path).rows())


def test_rows_and_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    first, second = '{"text": "ünï 🙂", "id": 7}', '{"prompt": "p", "response": "r", "text": null}'
    path.write_bytes(b"\xef\xbb\xbf" + f"{first}\r\n\n   \n{second}".encode())
    found = read(path)
    assert [(each.line, each.offset) for each in found] == [(1, 0), (4, len(first.encode()) + 10)]
    assert isinstance(found[0].row, TextRow)
    assert list(found[0].row.pieces) == ["ünï 🙂"]
    assert found[1].row == PairRow(prompt="p", response="r")


def test_a_conversation_keeps_what_templates_read() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    row = parse_row({"messages": [{**USER, "name": None}, call], "tools": [{"name": "f"}]})
    assert row == ChatRow(messages=(USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}), tools=({"name": "f"},))


def test_a_text_file_is_one_document_however_it_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_CHUNK_NBYTES", 3)  # within characters of several bytes
    path = tmp_path / "book.TXT"
    text = "Größe\r\n🙂 🙂\n\nend"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    source = open_source(path)
    (found,) = source.rows()
    assert isinstance(found.row, TextRow)
    assert "".join(found.row.pieces) == text
    assert source.consumed_nbytes == path.stat().st_size


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "a row is an object such as"),
        ("text", "a row is an object such as"),
        ({}, r"nothing to learn in it \(no keys\)"),
        ({"content": "a", "id": 1}, r"nothing to learn in it \('content', 'id'\)"),
        ({"text": "a", "messages": [USER]}, '"text" as well as "messages"'),
        ({"text": "a", "prompt": "b"}, '"text" as well as "prompt" and "response"'),
        ({"text": 3}, '"text" is a text in quotes, not 3'),
        ({"text": ["a"]}, '"text" is a text in quotes, not'),
        ({"text": " \n"}, '"text" is empty'),
        ({"prompt": "a"}, '"response" is missing'),
        ({"response": "a"}, '"prompt" is missing'),
        ({"prompt": "a", "response": ""}, '"response" is empty'),
        ({"prompt": 1, "response": "a"}, '"prompt" is a text'),
        ({"text": "a\ud800b"}, r"'\\ud800' is half a surrogate pair"),
        ({"messages": [USER, {"role": "assistant", "content": "\udfff"}]}, "half a surrogate pair"),
        ({"messages": "hello"}, '"messages" is a list of'),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": [USER]}, 'no message has the role "assistant"'),
        ({"messages": [USER, "a"]}, "message 2 is no"),
        ({"messages": [{"content": "q"}, ASSISTANT]}, 'message 1: "role" is a word'),
        ({"messages": [{"role": 3, "content": "q"}, ASSISTANT]}, 'message 1: "role" is a word'),
        ({"messages": [{"role": "user"}, ASSISTANT]}, 'message 1: "content" is a text in quotes, not nothing'),
        ({"messages": [{"role": "user", "content": [1]}, ASSISTANT]}, 'message 1: "content" is a text'),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, 'message 2: the assistant\'s "content" is empty'),
        ({"messages": [USER, ASSISTANT], "tools": "f"}, '"tools" is a list of objects'),
    ],
)
def test_rows_that_are_none(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n\n' + json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"not JSON \(.* at column 2\); write one object per line"),
        (b"hello", "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8 text; convert the file"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8 text"),
        (b"\x00\x00", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": ' + b"1" * 10_000 + b"}", "not JSON that can be read"),
        (b'{"messages": ' + b'[{"a":' * 400 + b"1" + b"}]" * 400 + b"}", "message 1"),
    ],
)
def test_lines_that_are_no_json(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line)
    with pytest.raises(UsageError, match=message) as caught:
        read(path)
    assert "line 2" in str(caught.value)


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE_NBYTES", 2**20)
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "' + b"a" * 2**20)
    with pytest.raises(UsageError, match="line 1: longer than 1 MiB"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\nc\xff", "line 3: not UTF-8"),
        (b"a\nb\xf0\x9f", "line 2: not UTF-8"),
        (b" \n\n", "empty"),
        (b"", "empty"),
    ],
)
def test_text_files_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    (found,) = read(path)
    assert isinstance(found.row, TextRow)
    with pytest.raises(UsageError, match=message):
        list(found.row.pieces)


def test_files_that_are_none(tmp_path: Path) -> None:
    for name, message in (("data.json", "'.json'"), ("data.jsonl.gz", "'.gz'"), ("data", "'one without'")):
        with pytest.raises(UsageError, match=message):
            open_source(tmp_path / name)
    with pytest.raises(UsageError, match="No such file"):
        open_source(tmp_path / "data.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UsageError, match="no plain file"):
        open_source(tmp_path / "folder.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UsageError, match="no plain file"):
        open_source(tmp_path / "pipe.jsonl")


@given(st.lists(st.text(alphabet="ab \n\t", max_size=30), max_size=6), st.integers(2, 12))
def test_pieces_are_the_text(texts: list[str], characters: int) -> None:
    found = list(cut(texts, characters=characters))
    assert "".join(found) == "".join(texts)
    assert all(0 < len(piece) <= characters for piece in found)


def test_pieces_end_at_lines_then_at_spaces() -> None:
    assert list(cut(["one two\nthree", " four five six"], characters=12)) == ["one two\n", "three four", " five six"]
    assert list(cut(["a\n\n\nb" + "c" * 6], characters=6)) == ["a\n\n\n", "bcccccc"[:6], "c"]
    assert list(cut(["x" * 10], characters=4)) == ["xxxx", "xxxx", "xx"]
