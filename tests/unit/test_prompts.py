"""Files of prompts: what a line may be, and that what is wrong is named by its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.cli.prompts import ManyRequest, digest, read_prompts
from penstock.cli.request import Sampling
from penstock.memory.errors import UsageError

GREEDY = Sampling(temperature=None, top_p=None, top_k=None, seed=None)


def written(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def request(**changes: Any) -> ManyRequest:
    options: dict[str, Any] = {
        "checkpoint": "here", "file": Path("p"), "output": Path("o"), "resume": False, "force": False, "chat": False,
        "max_new_tokens": 8, "sampling": GREEDY, "max_memory": "auto", "device": "cpu", "disk": None, "dtype": "auto",
        "trust_remote_code": False, "as_json": False,
    }  # fmt: skip
    return ManyRequest(**{**options, **changes})


def test_every_kind_of_line(tmp_path: Path) -> None:
    text = '\ufeff"a text"\n\n{"prompt": "ünï 🙂\\n", "max_new_tokens": 3, "id": "x"}\r\n{"ids": [1, 2]}\n"a text"\n""'
    found = read_prompts(written(tmp_path / "p", text))
    assert [line.text for line in found] == ["a text", "ünï 🙂\n", None, "a text", ""]
    assert [line.line for line in found] == [1, 3, 4, 5, 6]
    assert (found[1].max_new_tokens, found[1].id, found[2].ids) == (3, "x", (1, 2))


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    assert len(read_prompts(written(tmp_path / "p", '"a\u2028b\x85c"\n'))) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a text", "not JSON .*column 1"),
        ('{"prompt": "a"', "not JSON"),
        ("[" * 100_000, "deeply|not JSON"),
        ("9" * 5000, "not JSON|a prompt is"),
        ("[1, 2]", "a prompt is a text"),
        ("null", "a prompt is a text"),
        ('{"prompt": 5}', '"prompt" is a text'),
        ('{"text": "a"}', "unknown key 'text'"),
        ('{"prompt": "a", "ids": [1]}', "one of"),
        ("{}", "one of"),
        ('{"ids": []}', "at least one"),
        ('{"ids": [1, -2]}', "token ids"),
        ('{"ids": [true]}', "token ids"),
        ('{"prompt": "a", "max_new_tokens": 0}', "from 1"),
        ('{"prompt": "a", "max_new_tokens": 1.5}', "from 1"),
        ('{"prompt": "a", "id": [1]}', "a text or a number"),
        ('"\\ud800"', "surrogate"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(UsageError, match=rf"line 3: .*({words})"):
        read_prompts(written(tmp_path / "p", f'"fine"\n\n{line}\n"fine"\n'))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path / "nothing")
    for empty in ("", "\n \n"):
        with pytest.raises(UsageError, match="has no prompts"):
            read_prompts(written(tmp_path / "p", empty))
    with pytest.raises(UsageError, match="line 2: not UTF-8"):
        read_prompts(written(tmp_path / "p", b'"a"\n"\xe9"\n'))


def test_a_digest_tells_prompts_and_settings_apart(tmp_path: Path) -> None:
    lines = read_prompts(written(tmp_path / "p", '"a"\n"b"\n'))
    more = read_prompts(written(tmp_path / "q", '"a"\n{"prompt": "b", "max_new_tokens": 2}\n'))
    sampled = Sampling(temperature=1.0, top_p=None, top_k=None, seed=1)
    found = {
        digest(lines, request()),
        digest(lines[:1], request()),
        digest(more, request()),
        digest(lines, request(max_new_tokens=9)),
        digest(lines, request(sampling=sampled)),
        digest(lines, request(checkpoint="there")),
        digest(lines, request(chat=True)),
    }
    assert len(found) == 7
    assert digest(lines, request(max_memory="host=1GiB", resume=True)) in found, "how it runs changes nothing"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"output": None, "resume": True}, "--output"),
        ({"output": None, "as_json": True}, "--output"),
        ({"resume": True, "force": True}, "one of them"),
        ({"max_memory": "8G"}, "8G"),
    ],
)
def test_requests_without_meaning(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        request(**changes)
