"""A checkpoint to damage, the command to run over it, and what a refusal must look like."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from penstock import cli

FAILED, USAGE, DOES_NOT_FIT = 1, 2, 3
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


class Place:
    """A copy of a good checkpoint to damage, a scratch folder, and the command to run over both."""

    def __init__(self, root: Path, good: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = root / "checkpoint"
        self.scratch = root / "scratch"
        self.scratch.mkdir()
        shutil.copytree(good, self.folder)
        self._capture = capture

    @property
    def shard(self) -> Path:
        """The last of the shards."""
        return sorted(self.folder.glob("*.safetensors"))[-1]

    def run(self, *options: str, memory: str = "host=64MiB", path: Path | str | None = None) -> Outcome:
        """`penstock run`, in this process."""
        arguments = ["run", str(path or self.folder), "--prompt-ids", "5,6,7", "--max-new-tokens", "2"]
        arguments += ["--device", "cpu", "--max-memory", memory, "--disk", str(self.scratch), *options]
        self._capture.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("PENSTOCK_DEBUG", raising=False)  # with it, tracebacks are shown
            code = cli.main(arguments)
        said = self._capture.readouterr()
        return Outcome(code=code, out=said.out, err=said.err)

    def edit_config(self, **changes: Any) -> None:
        """Change the checkpoint's config.json."""
        file = self.folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    def edit_index(self, change: Callable[[dict[str, str]], None]) -> None:
        """Change the index's weight map."""
        file = self.folder / INDEX
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    def edit_header(self, change: Callable[[dict[str, Any]], None], shard: Path | None = None) -> None:
        """Change the header of a shard, the last unless told; the data stays."""
        file = shard or self.shard
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def check_refused(outcome: Outcome, code: int, *words: str) -> None:
    """The exit code, nothing on stdout, no traceback, and one line that holds all `words`, whatever their case."""
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    lines = [line for line in outcome.err.splitlines() if line.lower().startswith("error")]
    assert len(lines) == 1, outcome.err
    for word in words:
        assert word.lower() in lines[0].lower(), (word, lines[0])
