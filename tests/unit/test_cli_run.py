"""`penstock run`: what goes where, what is refused before anything slow, and how the pace is worked out."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from penstock.cli import main
from penstock.cli.pace import Stopwatch, measure, render
from penstock.cli.progress import first_sweep
from penstock.cli.request import Prompt, Sampling, read_prompt
from penstock.memory.errors import UsageError
from penstock.scheduler.plan import Links, Plan, PlannedBlock
from penstock.scheduler.timeline import Record

GIB = 2**30
SECOND = 10**9


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's checkpoint at its smallest: it has a tokenizer."""
    from penstock.demo.checkpoint import DemoShape, write

    folder = tmp_path_factory.mktemp("demo")
    write(folder, DemoShape(hidden_size=64))
    return folder


@pytest.fixture
def bare(checkpoint: Path, tmp_path: Path) -> Path:
    """The same without a tokenizer."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in checkpoint.iterdir():
        if not file.name.startswith("tokenizer"):
            (folder / file.name).symlink_to(file)
    return folder


def run(folder: Path, *options: str) -> int:
    return main(["run", str(folder), "--device", "cpu", "--max-memory", "host=2MiB", *options])


def test_text_and_nothing_else_on_stdout(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(checkpoint, "--prompt", "import os", "--max-new-tokens", "6") == 0
    out, error = capsys.readouterr()
    assert out.endswith("\n")
    assert out.strip()
    assert "plan for" in error
    assert "6 tokens in" in error
    assert "achieved/bound" in error
    assert "\x1b" not in out + error  # no terminal: neither colours nor a bar

    assert run(checkpoint, "--prompt", "import os", "--max-new-tokens", "6", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["text"].strip() == out.strip()
    assert len(document["ids"]) == 6
    assert document["timings"]["tokens"] == 6
    assert document["timings"]["distance"] > 0
    assert document["plan"]["resident"] is False
    assert document["plan"]["disk_nbytes_per_sweep"] > 0
    assert document["statistics"]["disk_read_nbytes"] > 0


def test_ids_where_there_is_no_tokenizer(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bare, "--prompt-ids", "5, 6,7", "--max-new-tokens", "3") == 0
    ids = capsys.readouterr().out
    assert len([int(token) for token in ids.strip().split(",")]) == 3
    assert main(["run", str(bare), "--prompt-ids", "5,6,7", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    resident = capsys.readouterr()
    assert resident.out == ids
    assert "everything fits" in resident.err
    assert run(bare, "--prompt", "import os") == 2
    assert "--prompt-ids" in capsys.readouterr().err


def test_sampling_is_repeatable(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for seed in ("0", "0", "1"):
        options = ("--prompt-ids", "5", "--max-new-tokens", "8", "--temperature", "1.5", "--seed", seed)
        assert run(bare, *options) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_prompt_from_a_file(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt").write_text("import os")
    outs = []
    for option in (("--prompt", "import os"), ("--prompt-file", str(tmp_path / "prompt"))):
        assert run(checkpoint, *option, "--max-new-tokens", "2") == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]


def test_chat_template(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(checkpoint, "--prompt", "import os", "--chat") == 2
    assert "no chat template: leave out --chat" in capsys.readouterr().err
    folder = tmp_path / "chat"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text("{{ messages[0].role }}: {{ messages[0].content }}")
    options = ("--max-new-tokens", "2", "--json")
    assert run(folder, "--prompt", "import", "--chat", *options) == 0
    chat = json.loads(capsys.readouterr().out)
    assert run(folder, "--prompt", "user: import", *options) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == chat["ids"]
    (folder / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    assert run(folder, "--prompt", "import", "--chat", *options) == 1
    assert "chat template failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "nothing to continue"),
        (("--prompt", ""), "nothing to continue"),
        (("--prompt", "a", "--prompt-ids", "1"), "exclude each other"),
        (("--prompt-ids", "1,b"), "'b' is not a token id"),
        (("--prompt-ids", "1", "--chat"), "--prompt instead"),
        (("--prompt-ids", "1", "--seed", "3"), "--temperature"),
        (("--prompt-ids", "1", "--max-memory", "8G"), "host=8G"),
        (("--prompt-file", "/nowhere/prompt"), "cannot be read"),
        (("--prompt-ids", "4096"), "0 to 4095"),
        (("--prompt-ids", "1", "--max-new-tokens", "2048"), "2048 positions"),
    ],
)
def test_usage(bare: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str) -> None:
    assert main(["run", str(bare), "--device", "cpu", *options]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert words in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


def test_prompt_and_sampling_records(tmp_path: Path) -> None:
    assert read_prompt(text=None, file=None, ids="1, 2", chat=False) == Prompt(text=None, ids=(1, 2), chat=False)
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_prompt(text=None, file=tmp_path / "latin", ids=None, chat=False)
    greedy = Sampling(temperature=None, top_p=None, top_k=None, seed=None)
    assert greedy.options()["do_sample"] is False
    assert Sampling(temperature=0, top_p=0.5, top_k=None, seed=None).greedy
    assert Sampling(temperature=0.5, top_p=0.9, top_k=None, seed=0).options() == {
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
    }


def block(number: int, home: Any) -> PlannedBlock:
    return PlannedBlock(id=number, name=f"layer {number}", nbytes=GIB, slot_nbytes=GIB, home=home)


PLAN = Plan(
    device="cpu", emulated=False, resident=False, weights_nbytes=4 * GIB, tables=(),
    blocks=(block(0, "host"), block(1, "disk"), block(2, "disk"), block(3, "disk")),
    host_nbytes=2 * GIB, host_budget_nbytes=2 * GIB, device_nbytes=0, device_budget_nbytes=None, slots=2,
    slot_nbytes=GIB, host_slots=0, disk_nbytes_per_sweep=3 * GIB, link_nbytes_per_sweep=0,
    links=Links(disk_read=1.5 * GIB), depth=1,
)  # fmt: skip


def watch(*seconds: float, waited_s: float = 0.0) -> Stopwatch:
    return Stopwatch(
        started_ns=0,
        loaded_ns=SECOND,
        token_ns=[int(at * SECOND) for at in seconds],
        waited_first_s=1.0,
        waited_last_s=1.0 + waited_s,
    )


def reads(*blocks: int, at_s: float) -> Iterator[Record]:
    for number in blocks:
        yield Record(kind="read", block=number, start_ns=int(at_s * SECOND), end_ns=int(at_s * SECOND) + 1)


def test_pace_against_the_disk() -> None:
    pace = measure(watch(4, 6.5, 9, waited_s=3), PLAN, reads(1, 2, 3, at_s=5))
    assert (pace.tokens, pace.load_s, pace.first_token_s, pace.total_s) == (3, 1, 3, 9)
    assert (pace.s_per_token, pace.waited_s_per_token, pace.compute_s_per_token) == (2.5, 1.5, 1.0)
    assert (pace.bound_s_per_token, pace.bound_by, pace.distance) == (2.0, "disk", 1.25)
    text = "\n".join(line.plain for line in render(pace, PLAN))
    assert "bound 2.000 s/token by the disk at 1.50 GiB/s; achieved/bound 1.25" in text
    emulated = dataclasses.replace(PLAN, emulated=True)
    assert "(emulated)" in "\n".join(line.plain for line in render(pace, emulated))


def test_pace_counts_the_experts_that_were_read() -> None:
    """Of blocks 2 and 3, which are experts, the plan expects 1 GiB per token; two tokens read 3 GiB of them."""
    plan = dataclasses.replace(
        PLAN, expert_blocks=2, expert_passing=1, disk_nbytes_per_sweep=2 * GIB, expert_read_nbytes=GIB
    )
    records = [msgspec.structs.replace(each, nbytes=GIB) for each in (*reads(1, 2, at_s=5), *reads(1, 2, 3, at_s=5.5))]
    pace = measure(watch(4, 6.5, 9, waited_s=4), plan, records)
    assert pace.bound_s_per_token == (1 + 1.5) / 1.5
    assert pace.bound_by == "disk"


def test_pace_counts_only_what_later_sweeps_use() -> None:
    """An encoder runs once: its blocks are read before the first token, and are no part of the sweeps after it."""
    records = [*reads(1, 2, 3, at_s=2), *reads(2, at_s=5)]
    pace = measure(watch(4, 5, 6), PLAN, records)
    assert pace.bound_s_per_token == 1.0  # of compute, since the disk needs 2/3 s
    assert pace.bound_by == "compute"


def test_pace_of_one_token_and_of_a_resident_model() -> None:
    alone = measure(watch(4), PLAN, ())
    assert (alone.s_per_token, alone.distance) == (None, None)
    assert len(render(alone, PLAN)) == 1
    resident = dataclasses.replace(PLAN, resident=True)
    assert measure(watch(4, 5, 6), resident, ()).distance is None


def test_the_bar_follows_its_counter_and_disappears() -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with first_sweep(console, 4 * 2**20, lambda: 2**20) as bar:
        assert bar is not None
        bar.refresh()
    assert "1.0/4.0 MiB" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K")  # the line is wiped
    with first_sweep(Console(file=StringIO()), 4 * 2**20, lambda: 0) as bar:
        assert bar is None


def test_interrupt_is_130_and_leaves_nothing(bare: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "penstock", "run", str(bare), "--prompt-ids", "5", "--max-new-tokens", "2000"]
    command += ["--device", "cpu", "--max-memory", "host=2MiB", "--disk", str(scratch)]
    environment = {name: value for name, value in os.environ.items() if name != "PENSTOCK_DEBUG"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1).isdigit()  # it streams
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.endswith("interrupted\n")
    assert "Traceback" not in error
    assert list(scratch.iterdir()) == []
