"""kill -9 at any operation of a whole run: it goes on from its last commit, with the bits of one that nobody disturbed.

The plain run in PyTorch that every life is compared with is in `training_child`. By default some dozens of lives are
ended; PENSTOCK_KILLS=300 ends so many of each kind.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import training_child
from training_child import CASES, EVERY, STEPS
from training_reference import PLENTY, smallest
from zoo.finetune import write_checkpoint, write_rows

import penstock
from penstock.memory.errors import StoreDamagedError, StoreError
from penstock.memory.store import BlockStore
from penstock.runtime.training.run import decode

KILLS = int(os.environ.get("PENSTOCK_KILLS", "0"))
FINETUNE_BUDGET = "host=15MiB"
"""Under which the tiny model streams."""


class Nursery:
    """Starts children and hears what they say until they are gone."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        with errors.open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, training_child.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env={**os.environ, "PENSTOCK_DEBUG": "1"},
            )

    def life(self, **order: Any) -> list[str]:
        """What a child said."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        said: list[str] = []
        while (line := self._process.stdout.readline().strip()) != "gone":
            assert line, self.errors.read_text()
            said.append(line)
        assert not [line for line in said if line.startswith(("error", "failed"))], (said, self.errors.read_text())
        return said

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(20) == 0
        self._process.stdout.close()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    made = Nursery(tmp_path_factory.mktemp("nursery") / "errors")
    yield made
    made.close()


@cache
def expected(kind: str) -> tuple[list[str], list[str]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return training_child.expected(CASES[kind])
    finally:
        torch.set_num_threads(before)


def budget(kind: str, folder: Path) -> int:
    """The least host memory with which a run can begin, and go on however it was begun: its weights stream."""
    case, options = CASES[kind], {"device": "cpu", "updates": kind}

    def prepare(memory: dict[str, int]) -> Any:
        return penstock.prepare(case.build(), optimizer=case.optimizer, disk=folder, max_memory=memory, **options)

    def resume(memory: dict[str, int]) -> Any:
        return penstock.resume(folder, model=case.build(), max_memory=memory, **options)

    _, least = smallest(lambda memory, device: prepare(memory), "smallest")
    model, optimizer = prepare({"host": PLENTY})
    penstock.save(model, optimizer).wait()
    penstock.close(model)
    _, more = smallest(lambda memory, device: resume(memory), "smallest")
    found = max(least["host"], more["host"])
    model, _ = resume({"host": found})
    assert not model.penstock.plan.resident
    penstock.close(model)
    return found


@dataclass(kw_only=True)
class Run:
    """One folder, and what its lives have said."""

    kind: str
    folder: Path
    done: int = 0
    """Steps of the newest commit that was said to be published."""
    begun: int = 0
    """Of the newest that was begun."""
    ended: bool = False
    resumed: list[int] = field(default_factory=list)

    def hear(self, said: list[str]) -> None:
        """Compare a life with the plain run."""
        losses, states = expected(self.kind)
        for line in said:
            what, *words = line.split()
            if what == "fresh":
                assert self.done == 0, line
                self.begun = 0
            elif what == "resumed":
                assert self.done <= int(words[0]) <= self.begun, (line, self)
                self.resumed.append(int(words[0]))
            elif what == "state":
                assert words[1] == states[int(words[0])], (line, said)
            elif what == "step":
                assert " ".join(words[1:]) == losses[int(words[0])], line
            elif what == "saving":
                self.begun = max(self.begun, int(words[0]))
            elif what == "done":
                self.done = max(self.done, int(words[0]))
            elif what == "ended":
                self.ended = True


@pytest.mark.parametrize("kind", list(CASES))
def test_killed_at_any_operation(kind: str, tmp_path: Path, nursery: Nursery) -> None:
    """One life after the other, until some runs have come to their ends."""
    tight = budget(kind, tmp_path / "nothing")
    whole = Run(kind=kind, folder=tmp_path / "whole")
    said = nursery.life(kind=kind, folder=str(whole.folder), host=tight, last=0)
    whole.hear(said)
    assert whole.ended
    total = int(said[-1].split()[1])
    draw = random.Random(os.urandom(8) if KILLS else 3)
    kills, resumes, ends, runs = 0, 0, 0, 0
    while kills < (KILLS or 30):
        runs += 1  # one may end before it is killed
        run = Run(kind=kind, folder=tmp_path / f"run {runs}")
        while not run.ended and kills < (KILLS or 30):
            last = draw.randint(1, 2 * total // 3)
            host = draw.choice((tight, PLENTY))
            said = nursery.life(kind=kind, folder=str(run.folder), host=host, last=last)
            run.hear(said)
            kills += not run.ended
        resumes += len(run.resumed)
        ends += run.ended
        if not run.ended:
            run.hear(nursery.life(kind=kind, folder=str(run.folder), host=tight, last=0))
            assert run.ended
    print(f"{kind}: {total} operations; {kills} kills, {resumes} resumed, {ends} runs to the end")
    assert resumes > kills // 4


@pytest.mark.parametrize("kind", ["step"])
def test_killed_while_the_folder_is_made(kind: str, tmp_path: Path, nursery: Nursery) -> None:
    """Whatever was there already, the run begins anew."""
    tight = budget(kind, tmp_path / "nothing")
    draw = random.Random(5)
    points = range(1, 80) if KILLS else sorted(draw.sample(range(1, 80), 12))
    for last in points:
        run = Run(kind=kind, folder=tmp_path / str(last))
        run.hear(nursery.life(kind=kind, folder=str(run.folder), host=tight, last=last))
        assert not run.ended
        run.hear(nursery.life(kind=kind, folder=str(run.folder), host=tight, last=last + 300))
        assert run.begun or run.ended


def test_killed_again_and_again_while_it_is_resumed(tmp_path: Path, nursery: Nursery) -> None:
    kind, run = "step", Run(kind="step", folder=tmp_path / "run")
    tight = budget(kind, tmp_path / "nothing")
    last = 200
    while not run.done:
        run.hear(nursery.life(kind=kind, folder=str(run.folder), host=tight, last=last))
        last += 50
    done = run.done
    for last in range(1, 60) if KILLS else range(1, 60, 6):
        run.hear(nursery.life(kind=kind, folder=str(run.folder), host=tight, last=last))
    assert run.done <= done + EVERY
    run.hear(nursery.life(kind=kind, folder=str(run.folder), host=tight, last=0))
    assert run.ended
    assert STEPS % EVERY, "the last commit is not one of every few steps"


def test_finetune_killed_at_any_operation(tmp_path: Path, nursery: Nursery) -> None:
    """The command line, with its tokens, metrics and locks. Every line of metrics is that of an undisturbed run."""
    arguments = ["finetune", str(write_checkpoint(tmp_path / "tiny", layers=2, attention_dropout=0.1))]
    arguments += ["--data", str(write_rows(tmp_path / "zen.jsonl")), "--seq", "32", "--batch", "2", "--steps", "6"]
    arguments += ["--lr", "3e-3", "--commit-every", "2", "--eval-fraction", "0.2", "--eval-every", "3"]
    arguments += ["--device", "cpu", "--max-memory", FINETUNE_BUDGET, "--resume", "--out"]

    def life(folder: Path, last: int) -> list[str]:
        folder.parent.mkdir(exist_ok=True)
        return nursery.life(kind="finetune", folder=str(folder), last=last, arguments=[*arguments, str(folder)])

    whole = tmp_path / "whole" / "run"
    said = life(whole, 0)
    assert said[0] == "exit 0", whole.with_name("run.said").read_text()
    total = int(said[-1].split()[1])
    draw = random.Random(os.urandom(8) if KILLS else 6)
    kills = committed = 0
    while kills < (KILLS // 3 or 8):
        folder = tmp_path / f"after {kills}" / "run"
        ended = False
        while not ended:
            before = committed_steps(folder)
            over = kills >= (KILLS // 3 or 8)
            said = life(folder, 0 if over else draw.randint(1, total))
            ended = said[:1] == ["exit 0"]
            assert ended or not said, (said, folder.with_name("run.said").read_text())
            kills += not ended
            committed += committed_steps(folder) > before
            assert committed_steps(folder) >= before
            found = steps_of(folder)
            assert found == steps_of(whole)[: len(found)]
            assert len(found) >= committed_steps(folder)
        assert steps_of(folder) == steps_of(whole)
    print(f"finetune: {total} operations; {kills} kills, {committed} of these lives committed")
    assert committed


def committed_steps(folder: Path) -> int:
    """Steps that the last commit has; 0 where there is none."""
    try:
        with BlockStore.open(folder / "states", readonly=True) as store:
            return decode(store.metadata).extra["step"] if store.committed else 0
    except StoreDamagedError:
        raise
    except StoreError:  # there is none yet
        return 0


def steps_of(folder: Path) -> list[Any]:
    """What the whole lines of metrics say, but for how fast."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    fast = ("seconds", "tokens_per_s", "computed_s", "copied_nbytes", "disk_read_nbytes", "disk_written_nbytes")
    return [{name: value for name, value in json.loads(line).items() if name not in fast} for line in lines]
