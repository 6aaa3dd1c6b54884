"""The file of tokens: what is in it, when it is taken again, and what becomes of damage."""

from __future__ import annotations

import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_data_files import BOS, EOS, MARKED, PLAIN, ids, letter_tokenizer, turn, word_tokenizer, words, write_rows

from penstock.memory.errors import DiskError, ScratchBusyError, UsageError
from penstock.runtime.training.data import tokenizing, tokenwriter
from penstock.runtime.training.data.tokenfile import HEADER, TokenFile, read_token_file
from penstock.runtime.training.data.tokenizing import FILE_NAME, TokenizingProgress, tokenized
from penstock.runtime.training.data.tokenwriter import TokenWriter

TEXTS = [{"text": words(1, 2)}, {"text": words(3)}, {"text": words(4, 5, 6)}]


def documents(file: TokenFile) -> list[list[int]]:
    ends = [0, *file.documents["end"].tolist()]
    return [file.tokens[begin:end].tolist() for begin, end in itertools.pairwise(ends)]


def test_texts_with_begin_and_end(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in TEXTS[:2]) + "\n\n" + json.dumps(TEXTS[2]))
    file = tokenized(path, word_tokenizer(), folder=tmp_path / "run")
    assert documents(file) == [[BOS, *ids(*row), EOS] for row in ((1, 2), (3,), (4, 5, 6))]
    assert file.loss is None
    assert file.tokens.dtype == np.uint16
    assert file.documents["line"].tolist() == [1, 2, 4]
    lines = path.read_bytes()
    assert [json.loads(lines[at:].split(b"\n")[0]) for at in file.documents["offset"].tolist()] == TEXTS
    assert file.documents["loss"].tolist() == file.lengths().tolist() == [4, 3, 5]
    assert file.largest == ids(6)[0]
    assert os.listdir(tmp_path / "run") == [FILE_NAME]


def test_flags_of_conversations(tmp_path: Path) -> None:
    rows = [{"messages": [turn("user", words(1)), turn("assistant", words(number, 2))]} for number in range(3)]
    file = tokenized(write_rows(tmp_path / "d.jsonl", rows), word_tokenizer(template=MARKED), folder=tmp_path)
    assert file.loss is not None
    assert file.loss.reshape(3, -1).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]] * 3
    assert file.documents["loss"].tolist() == [3, 3, 3]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(words=2**16)
    file = tokenized(write_rows(tmp_path / "d.jsonl", [{"text": "w65535"}]), tokenizer, folder=tmp_path)
    assert file.tokens.dtype == np.uint32
    assert documents(file) == [[BOS, *ids(65535), EOS]]


def test_a_book_in_pieces_has_the_tokens_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [number % 50 for number in range(90_000)]
    text = "".join(f"w{number}{' ' if number % 7 else chr(10)}" for number in numbers)
    path = tmp_path / "book.txt"
    path.write_text(text)
    monkeypatch.setattr(tokenizing, "_TOGETHER_CHARACTERS", 2**17)
    told: list[TokenizingProgress] = []
    monkeypatch.setattr(tokenizing, "_TELL_NBYTES", 2**17)
    file = tokenized(path, word_tokenizer(), folder=tmp_path, progress=told.append)
    assert documents(file) == [[BOS, *ids(*numbers), EOS]]
    assert told[-1] == TokenizingProgress(nbytes=len(text), of_nbytes=len(text), documents=1, tokens=len(numbers) + 2)
    assert [each.nbytes for each in told] == sorted(each.nbytes for each in told)


def test_tokens_are_taken_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows(tmp_path / "d.jsonl", TEXTS)
    first = tokenized(path, word_tokenizer(), folder=tmp_path / "run")
    inode = os.stat(first.path).st_ino
    with caplog.at_level(logging.INFO):
        again = tokenized(path, word_tokenizer(), folder=tmp_path / "run", progress=lambda _: pytest.fail("anew"))
    assert "tokens are taken from" in caplog.text
    assert os.stat(first.path).st_ino == inode
    assert documents(again) == documents(first)
    assert again.digest == first.digest


def _touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def _other_bytes(path: Path) -> None:
    status = os.stat(path)
    path.write_bytes(path.read_bytes().replace(b"w1", b"w7"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "options", "message", "same"),
    [
        (_touch, {}, "source changed", True),
        (_other_bytes, {}, "source changed", False),
        (None, {"eos": False}, "eos changed", False),
        (None, {"tokenizer": word_tokenizer(bos=False)}, "tokenizer changed", False),
        (None, {"tokenizer": word_tokenizer(template=PLAIN)}, "tokenizer changed", True),
    ],
)
def test_what_changed_is_tokenized_again_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any, options: dict[str, Any], message: str, same: bool
) -> None:
    path = write_rows(tmp_path / "d.jsonl", TEXTS)
    first = tokenized(path, word_tokenizer(), folder=tmp_path)
    if change is not None:
        change(path)
    told: list[TokenizingProgress] = []
    again = tokenized(
        path, options.pop("tokenizer", word_tokenizer()), folder=tmp_path, progress=told.append, **options
    )
    assert told
    assert f"{message} since it was tokenized" in caplog.text
    assert (again.digest == first.digest) == same
    assert len(first.tokens) == 12, "what was mapped stays as it is"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "response": "b"}, 'it has "response" where the first row .at 1. has "text"'),
        ({"messages": [turn("user", "a"), turn("assistant", "b")]}, 'it has "messages" where'),
        ({"text": ""}, '"text" is empty'),
    ],
)
def test_a_bad_row_leaves_nothing_behind(tmp_path: Path, row: Any, message: str) -> None:
    path = write_rows(tmp_path / "d.jsonl", [*TEXTS, row])
    with pytest.raises(UsageError, match=f"line 4: {message}"):
        tokenized(path, word_tokenizer(), folder=tmp_path / "run")
    assert os.listdir(tmp_path / "run") == []


def test_rows_of_which_nothing_is_left(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"text": "abc"}, {"text": "xyz"}])
    with pytest.raises(UsageError, match="line 2: the tokenizer makes no tokens of it"):
        tokenized(path, letter_tokenizer(), folder=tmp_path)
    path.write_text("\n\n")
    with pytest.raises(UsageError, match="has no rows"):
        tokenized(path, letter_tokenizer(), folder=tmp_path)
    write_rows(path, [{"messages": [turn("user", "a"), turn("assistant", "b")]}])
    with pytest.raises(UsageError, match="line 1: the checkpoint has no chat template"):
        tokenized(path, word_tokenizer(), folder=tmp_path)


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", TEXTS)
    with pytest.raises(DiskError, match="was changed while it was read"):
        tokenized(path, word_tokenizer(), folder=tmp_path / "run", progress=lambda _: _touch(path))
    assert os.listdir(tmp_path / "run") == []


def test_every_byte_is_guarded(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", TEXTS)
    made = tokenized(path, word_tokenizer(), folder=tmp_path)
    good = made.path.read_bytes()
    tokens_at, rows_at = 64, good.index(made.documents.tobytes())
    tokens = range(tokens_at, tokens_at + made.tokens.nbytes)
    damaged = tmp_path / "damaged"
    for at in [*range(28), *tokens, *range(rows_at, len(good))]:
        damaged.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(DiskError, match="remove it, so that it is made again"):
            read_token_file(damaged)
    for nbytes in range(len(good)):
        damaged.write_bytes(good[:nbytes])
        with pytest.raises(DiskError, match="remove it"):
            read_token_file(damaged)


def test_a_damaged_file_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows(tmp_path / "d.jsonl", TEXTS)
    made = tokenized(path, word_tokenizer(), folder=tmp_path)
    good = made.path.read_bytes()
    os.truncate(made.path, HEADER.size + 7)
    again = tokenized(path, word_tokenizer(), folder=tmp_path)
    assert "damaged" in caplog.text
    assert again.path.read_bytes() == good


def test_what_a_killed_run_left_is_overwritten(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", TEXTS)
    (tmp_path / f"{FILE_NAME}.partial").write_bytes(b"x" * 10_000)
    (tmp_path / f"{FILE_NAME}.lock").write_bytes(b"pid 1 on nowhere")
    assert len(tokenized(path, word_tokenizer(), folder=tmp_path)) == 3
    assert sorted(os.listdir(tmp_path)) == ["d.jsonl", FILE_NAME]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", TEXTS)
    with TokenWriter(tmp_path / FILE_NAME, vocabulary=9), pytest.raises(ScratchBusyError):
        tokenized(path, word_tokenizer(), folder=tmp_path)
    assert os.listdir(tmp_path) == ["d.jsonl"]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(fd: int) -> None:
        done.append(f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{fd}'))}")
        fsync(fd)

    def logged_replace(source: Path, target: Path) -> None:
        done.append(f"{source.name} → {target.name}")
        assert HEADER.unpack(source.read_bytes()[: HEADER.size])[0] == b"pnsttok2"
        replace(source, target)

    monkeypatch.setattr(tokenwriter.os, "fsync", logged_fsync)
    monkeypatch.setattr(tokenwriter.os, "replace", logged_replace)
    tokenized(write_rows(tmp_path / "d.jsonl", TEXTS), word_tokenizer(), folder=tmp_path)
    assert done == [f"fsync {FILE_NAME}.partial", f"{FILE_NAME}.partial → {FILE_NAME}", f"fsync {tmp_path.name}"]


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", TEXTS)
    made = tokenized(path, word_tokenizer(), folder=tmp_path)
    good = made.path.read_bytes()
    with TokenWriter(made.path, vocabulary=9) as writer:
        writer._main.close()
        writer._main = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        with pytest.raises(DiskError, match=r"data\.tokens\.partial: No space left"), writer._main:
            writer.append(np.arange(5))
    assert made.path.read_bytes() == good
    assert sorted(os.listdir(tmp_path)) == ["d.jsonl", FILE_NAME]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", TEXTS)
    with pytest.raises(DiskError, match="cannot make the folder"):
        tokenized(path, word_tokenizer(), folder=path / "run")
