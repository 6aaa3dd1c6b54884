"""`penstock run --prompts`: where results go, what is refused, and that nothing finished is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from penstock.cli import main


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from penstock.demo.checkpoint import DemoShape, write

    folder = tmp_path_factory.mktemp("demo")
    write(folder, DemoShape(hidden_size=64))
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines: list[Any] = ["import os", {"prompt": "def f(x):", "max_new_tokens": 3, "id": "b"}, "ünï 🙂", {"ids": [5, 6]}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def run(folder: Path, prompts: Path, *options: str) -> int:
    base = ["run", str(folder), "--prompts", str(prompts), "--device", "cpu", "--max-memory", "host=3MiB"]
    return main([*base, "--max-new-tokens", "6", *options])


def results(text: str) -> dict[int, dict[str, Any]]:
    return {record["index"]: record for line in text.splitlines() if "index" in (record := json.loads(line))}


def test_results_on_stdout_are_those_of_single_runs(
    checkpoint: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoint, prompts) == 0
    out, error = capsys.readouterr()
    found = results(out)
    assert sorted(found) == [0, 1, 2, 3]
    assert (found[1]["id"], found[1]["tokens"], found[1]["prompt"]) == ("b", 3, "def f(x):")
    assert found[3]["prompt_ids"] == [5, 6]
    assert found[2]["prompt"] == "ünï 🙂"
    for words in ("plan for", "4 prompts in", "sweeps of", "achieved/bound"):
        assert words in error
    assert "\x1b" not in out + error
    single = ["run", str(checkpoint), "--prompt", "import os", "--device", "cpu", "--max-memory", "host=2MiB", "--json"]
    assert main([*single, "--max-new-tokens", "6"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert found[0]["ids"] == document["ids"]
    assert found[0]["text"] == document["text"]


def test_a_file_and_going_on_with_it(
    checkpoint: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.jsonl"
    assert run(checkpoint, prompts, "--output", str(path), "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["prompts"], summary["tokens"], summary["skipped"]) == (4, 21, 0)
    assert summary["sweeps"] >= 6
    assert summary["distance"] > 0
    whole = path.read_text()
    assert len(results(whole)) == 4

    assert run(checkpoint, prompts, "--output", str(path)) == 2
    assert "--resume" in capsys.readouterr().err
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])
    assert run(checkpoint, prompts, "--output", str(path), "--resume") == 0
    assert "2 of 4 results are there" in capsys.readouterr().err
    assert results(path.read_text()) == results(whole)
    assert run(checkpoint, prompts, "--output", str(path), "--resume") == 0, "nothing is left to do"
    assert results(path.read_text()) == results(whole)

    prompts.write_text('"other"\n')
    assert run(checkpoint, prompts, "--output", str(path), "--resume") == 2
    assert "other prompts" in capsys.readouterr().err
    assert run(checkpoint, prompts, "--output", str(path), "--force") == 0
    assert len(results(path.read_text())) == 1


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ('"a"\nb\n', (), "line 2: not JSON"),
        ("", (), "has no prompts"),
        ('"a"\n""\n', (), "line 2: the prompt has no tokens"),
        ('"a"\n{"ids": [4096]}\n', (), "line 2 has the token 4096"),
        ('{"ids": [5]}\n', ("--max-new-tokens", "2048"), "line 1 has 1 tokens; .* 2048 positions"),
        ('"a"\n', ("--prompt", "b"), "exclude each other"),
        ('"a"\n', ("--json",), "--output"),
        ('"a"\n', ("--resume",), "--output"),
        ('"a"\n', ("--top-k", "3"), "--temperature"),
    ],
)
def test_refused_before_anything_slow(
    checkpoint: Path,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    options: tuple[str, ...],
    words: str,
) -> None:
    prompts.write_text(content)
    assert run(checkpoint, prompts, *options) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert len(error.splitlines()) == 1
    assert re.search(words, error)


def test_results_need_prompts(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(checkpoint), "--prompt", "a", "--output", "x"]) == 2
    assert "--prompts" in capsys.readouterr().err


def test_too_little_memory_is_3(checkpoint: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(checkpoint, prompts, "--max-memory", "host=200KiB") == 3
    assert "bytes" in capsys.readouterr().err


def test_weights_give_way_to_sequences_within_the_budget(
    checkpoint: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoint, prompts, "--output", str(tmp_path / "out"), "--json") == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["host_budget_nbytes"] < 3 * 2**20


def test_interrupt_is_130_and_finished_lines_are_there(checkpoint: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "prompts", tmp_path / "out"
    path.write_text('{"ids": [5], "max_new_tokens": 2}\n' + '{"ids": [6, 7, 8, 9, 10]}\n' * 3)
    command = [sys.executable, "-m", "penstock", "run", str(checkpoint), "--prompts", str(path), "--output", str(out)]
    command += ["--device", "cpu", "--max-memory", "host=3MiB", "--max-new-tokens", "80"]
    environment = {name: value for name, value in os.environ.items() if name != "PENSTOCK_DEBUG"}
    environment["OMP_NUM_THREADS"] = "1"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 60
        while (not out.exists() or out.read_text().count("\n") < 2) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.endswith("interrupted\n")
    assert "1 more results are in" in error
    assert "Traceback" not in error
    assert list(results(out.read_text())) == [0]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_two_processors_are_told_of(share: float) -> None:
    from penstock.cli.batch import _told
    from penstock.runtime.throughput import ThroughputStatistics
    from penstock.scheduler.microbatches import Job, Schedule, cut

    batches = cut([Job(index=0, prompt_tokens=1, new_tokens=1)], 1, pads=True)
    choice = Schedule(batches=batches, lanes=1, prefill_tokens=1, nbytes=0, sweeps=7, seconds=0.0, cpu_share=share)
    now = ThroughputStatistics(prompts=1, finished=0, tokens=0, share=0.0, sweeps=0, cpu_share=0.0, schedule=choice)
    text = str(_told(now, streams=True))
    assert "about 7 sweeps" in text
    assert ("two processors alternate: the CPU computes 50% of what it can" in text) is bool(share)


def test_the_bar_is_for_terminals_only() -> None:
    from penstock.cli.batch import _bar
    from penstock.cli.output import Output
    from penstock.runtime.throughput import ThroughputStatistics
    from penstock.scheduler.microbatches import Schedule

    schedule = Schedule(batches=(), lanes=1, prefill_tokens=1, nbytes=0, sweeps=1, seconds=0.0)
    now = ThroughputStatistics(prompts=4, finished=1, tokens=3, share=0.25, sweeps=2, cpu_share=0.0, schedule=schedule)
    for terminal in (True, False):
        screen = StringIO()
        output = Output()
        output.notes = Console(file=screen, force_terminal=terminal, width=80)
        with _bar(output, lambda: now):
            pass
        assert ("1/4 prompts, sweep 2" in screen.getvalue()) is terminal
