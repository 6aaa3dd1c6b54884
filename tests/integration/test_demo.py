"""`penstock demo` at a small size: the same tokens under a third of the weights, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cli import demonstration, main
from penstock.demo.checkpoint import DemoShape, write
from penstock.demo.contest import Job, Outcome, Report, compete
from penstock.memory.errors import PenstockError

MIB = 2**20


def test_demo_streams_with_the_resident_tokens(tmp_path: Path) -> None:
    """In a process of its own, as a user runs it, without a network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "penstock", "demo", "--size", "20MiB", "--disk", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["weights_nbytes"] == pytest.approx(20 * MIB, rel=0.5)
    resident, streamed, emulated = document["runs"]
    assert resident["equal"] and streamed["equal"] and emulated["equal"]  # noqa: PT018
    assert resident["bound_s"] is None
    assert streamed["bound_s"] > 0
    assert emulated["bound_s"] > 0
    assert list(tmp_path.iterdir()) == []


def faked(tokens: dict[str, list[int]]) -> object:
    def compete_with(job: Job) -> Outcome:
        who = "resident" if job.budget is None else job.device.split(":")[0]
        report = Report(tokens=tokens[who], s_per_token=0.5, best_s=0.4, plan="")
        return Outcome(report=report, peak_nbytes=5 * MIB)

    return compete_with


def test_table_picture_and_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")
    same = {"resident": [1, 2], "cpu": [1, 2], "emulated": [1, 2]}
    monkeypatch.setattr(demonstration, "compete", faked(same))
    keep, svg = tmp_path / "kept", tmp_path / "demo.svg"
    arguments = ["demo", "--size", "5MiB", "--keep", str(keep), "--svg", str(svg)]
    assert main(arguments) == 0
    out, error = capsys.readouterr()
    assert error == ""
    for words in ("tokens/s", "2.00", "distance", "peak memory", "5.00 MiB", "Try next:", "penstock doctor", str(keep)):
        assert words in out
    assert svg.read_text().startswith("<svg")
    assert (keep / "tokenizer.json").exists()

    assert main(arguments) == 2  # never over what is there
    assert "--keep" in capsys.readouterr().err

    monkeypatch.setattr(demonstration, "compete", faked({**same, "emulated": [1, 3]}))
    assert main(["demo", "--size", "5MiB", "--disk", str(tmp_path / "scratch")]) == 1
    assert "NO" in capsys.readouterr().out
    assert not (tmp_path / "scratch").exists()


def test_a_contestant_that_fails_is_told_of(tmp_path: Path) -> None:
    job = Job(folder=str(tmp_path), prompt=[1], new_tokens=2, budget={"host": MIB})
    with pytest.raises(PenstockError, match=r"config\.json|safetensors"):
        compete(job)


@pytest.mark.parametrize("nbytes", [20 * MIB, 100 * MIB, 1024 * MIB, 4096 * MIB])
def test_shape_comes_close_to_the_size(nbytes: int) -> None:
    dims = DemoShape.of(nbytes).dims()
    total = 0
    for shape in dims.values():
        size = 2
        for dim in shape:
            size *= dim
        total += size
    assert total == pytest.approx(nbytes, rel=0.35 if nbytes < 50 * MIB else 0.15)


def test_checkpoint_is_the_same_each_time(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        written = write(tmp_path / name, DemoShape(hidden_size=64))
        contents.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
        assert written.swept_nbytes < written.weights_nbytes
        assert written.encode("import os")
    assert contents[0] == contents[1]
