from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.memory.errors import UsageError
from penstock.scheduler.work import Work, parse_work, read_work


def test_defaults() -> None:
    assert parse_work({}, where="w") == Work(prompt=512, generate=32, context=544)
    assert parse_work({"kind": "finetune", "batch": 4}, where="w").tokens == 4096


def test_policy_is_kept_for_the_system() -> None:
    assert parse_work({"policy": {"tier": "nvme"}}, where="w").policy == {"tier": "nvme"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "train"}, "w: kind is 'train': write one of run, batch, finetune"),
        ({"batch": 0}, "w: batch is 0: write a number from 1"),
        ({"prompt": "long"}, "w: prompt is 'long'"),
        ({"promt": 3}, "w: promt is not known: did you mean prompt?"),
        ({"policy": []}, "w: policy is \\[\\]"),
        ({"prompt": 100, "generate": 10, "context": 50}, "w: context is 50: write at least prompt \\+ generate.*110"),
        ([], "an object is needed"),
    ],
)
def test_what_has_no_meaning_is_refused(data: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_work(data, where="w")


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "work.json"
    with pytest.raises(UsageError, match="cannot be read"):
        read_work(file)
    file.write_text("{")
    with pytest.raises(UsageError, match="not JSON"):
        read_work(file)
    file.write_text('{"kind": "batch", "batch": 8}')
    assert read_work(file).batch == 8
