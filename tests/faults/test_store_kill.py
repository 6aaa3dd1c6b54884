"""kill -9, at any moment: the store is at the last commit that was said to be done, or at one that was on its way."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import store_child

from penstock.memory.errors import StoreError
from penstock.memory.store import BlockStore, verify


class Nursery:
    """Starts children and hears what they say until they are dead."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, store_child.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def life(self, folder: Path, *, last: int = 0, commits: int = 0, delay_s: float = 0.0) -> list[str]:
        """What a child said that died at its operation `last`, or was killed a while after it opened or committed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{folder} {last}\n")
        self._process.stdin.flush()
        said: list[str] = []
        killer: threading.Timer | None = None
        heard = 0
        while (line := self._process.stdout.readline().strip()) != "end":
            assert line, "the nursery is gone"
            if line.startswith("pid "):
                pid = int(line.split()[1])
            heard += line.startswith(("opened", "done"))
            if heard > commits and killer is None and not last:
                killer = threading.Timer(delay_s, os.kill, (pid, signal.SIGKILL))
                killer.start()
            said.append(line)
        if killer is not None:
            killer.join()
        return said

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(20) == 0
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


def check(folder: Path, said: list[str], before: int) -> int:
    """The commit that was found, after `before` was found the last time."""
    assert not [line for line in said if line.startswith("failed")], said
    done = max([before, *(int(line.split()[1]) for line in said if line.startswith("done"))])
    with BlockStore.open(folder, identity="child") as store:
        number = store.committed
        assert number == int(store.metadata)
        assert done <= number <= done + 3, "commits are drained every fourth time"
        found = {block: store.read(block) for block in range(len(store.blocks)) if store.has_state(block)}
    assert found == store_child.state(number)
    return number


def test_killed_at_any_time(tmp_path: Path, nursery: Nursery) -> None:
    draw = random.Random(7)
    number = 0
    for life in range(40):
        said = nursery.life(tmp_path / "run", commits=draw.randrange(4), delay_s=draw.uniform(0.0, 0.02))
        assert f"opened {number}" in said
        number = check(tmp_path / "run", said, number)
        if life % 10 == 0:
            assert verify(tmp_path / "run").good
    assert number >= 40, "they got something done: the draws above add up to more"


def test_killed_at_every_operation_of_the_first_commits(tmp_path: Path, nursery: Nursery) -> None:
    """From the first write of the making on: one more operation in each life, a new store in each."""
    unfinished = 0
    for last in range(1, 61):
        folder = tmp_path / str(last)
        said = nursery.life(folder, last=last)
        if not any(line.startswith("opened") for line in said):
            unfinished += 1
            try:
                check(folder, said, 0)
            except StoreError:  # cut off while it was made: the next one makes it again
                said = nursery.life(folder, last=200)
                assert "opened 0" in said
        check(folder, said, 0)
    assert 0 < unfinished < 30


def test_killed_again_and_again_while_it_is_opened(tmp_path: Path, nursery: Nursery) -> None:
    number = check(tmp_path / "run", nursery.life(tmp_path / "run", last=80), 0)
    for last in range(1, 31):
        number = check(tmp_path / "run", nursery.life(tmp_path / "run", last=last), number)
    assert number > 5
