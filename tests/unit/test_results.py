"""The file of results: whole lines, and going on after a kill at any byte."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from penstock.cli.results import ResultFile
from penstock.memory.errors import DiskError, PenstockError, UsageError

RECORDS = [{"index": i, "text": text} for i, text in enumerate(["plain", "ünï 🙂", "two\nlines", "\u2028"])]


def opened(path: Path, *, prompts: int = 4, digest: str = "d", resume: bool = False, force: bool = False) -> ResultFile:
    return ResultFile(path, prompts=prompts, digest=digest, resume=resume, force=force)


def written(path: Path, records: list[dict[str, Any]] = RECORDS) -> bytes:
    with opened(path, force=True) as file:
        file.begin()
        for record in records:
            file.write(record)
    return path.read_bytes()


def read(path: Path) -> list[Any]:
    """The results, without the header."""
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[1:-1]]


def test_lines_are_whole(tmp_path: Path) -> None:
    data = written(tmp_path / "out")
    assert data.count(b"\n") == 5
    assert read(tmp_path / "out") == RECORDS


def test_gone_on_with_after_a_kill_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "out"
    data = written(path)
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        with opened(path, resume=True) as file:
            there = set(file.finished)
            file.begin()
            for record in RECORDS:
                if record["index"] not in there:
                    file.write(record)
        assert path.read_bytes() == data, cut
        assert there == set(range(max(0, data[:cut].count(b"\n") - 1)))


def test_a_second_kill_while_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write itself stops at any byte, as on a full disk."""
    path = tmp_path / "out"
    data = written(path)
    real = os.write
    for room in range(0, len(data), 7):
        left = room

        def full(file: int, line: bytes) -> int:
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = real(file, line[:left])
            left -= count
            return count

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(DiskError, match=r"No space.*--resume"):
                written(path)
        with opened(path, resume=True) as file:
            file.begin()
            for record in RECORDS:
                if record["index"] not in file.finished:
                    file.write(record)
        assert path.read_bytes() == data


def test_a_file_that_is_there_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("precious")
    for options, words in (({}, "--resume goes on"), ({"resume": True}, "no file of results")):
        with pytest.raises(UsageError, match=words):
            opened(path, **options)  # type: ignore[arg-type]
        assert path.read_text() == "precious"
    with opened(path, force=True):
        assert path.read_text() == "precious", "not before there is something to write"
    assert path.read_text() == "precious"


def test_a_file_of_other_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    data = written(path)
    for options in ({"digest": "e"}, {"prompts": 5}):
        with pytest.raises(UsageError, match="other prompts or other settings"):
            opened(path, resume=True, **options)  # type: ignore[arg-type]
    path.write_bytes(b'{"penstock results": 2}\n')
    with pytest.raises(UsageError, match="another version"):
        opened(path, resume=True)
    path.write_bytes(data.replace(b'"index": 1', b'"index": 9'))
    with pytest.raises(PenstockError, match="line 3: not a result of these prompts"):
        opened(path, resume=True)
    path.write_bytes(data.replace(b'{"index": 1', b"\xff\xfe"))
    with pytest.raises(PenstockError, match="line 3"):
        opened(path, resume=True)


def test_a_run_that_never_began_leaves_no_file(tmp_path: Path) -> None:
    with opened(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time_and_plain_files_only(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as file:
        file.begin()
        with pytest.raises(UsageError, match="another process"):
            opened(tmp_path / "out", resume=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="no plain file"):
        opened(tmp_path / "pipe", force=True)
    with pytest.raises(UsageError, match="cannot be written"):
        opened(tmp_path / "no" / "out")
