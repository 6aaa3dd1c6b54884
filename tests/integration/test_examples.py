"""The examples that make their own model run, and what they print is true."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),  # transformers' and peft's own
]


def said(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """What an example prints, run from a folder that it may use."""
    monkeypatch.delenv("PENSTOCK_DEBUG")
    monkeypatch.chdir(folder)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert list(folder.iterdir()) == []
    return capsys.readouterr().out


def falls(text: str) -> None:
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", text).groups())  # type: ignore[union-attr]
    assert last < first


@pytest.mark.parametrize("name", ["finetune_full", "finetune_lora", "finetune_trainer", "finetune_vision", "offload"])
def test_examples(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = said(name, capsys, monkeypatch, tmp_path)
    if name == "finetune_full":
        falls(text)
        assert "the same when interrupted: True" in text
    elif name == "finetune_lora":
        losses = [float(found) for found in re.findall(r"loss ([\d.]+)", text)]
        assert losses[-1] < losses[0]
        assert "the same answers in memory: True" in text
    elif name == "finetune_trainer":
        falls(text)
        assert "6 steps; commit 1 is there" in text
    elif name == "finetune_vision":
        falls(text)
    else:
        assert "same bits: True" in text
