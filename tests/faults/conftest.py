"""The fixtures of the fault tests."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "integration"))  # training_reference: what training is compared with

from damage import Place
from zoo import ZOO

from penstock.runtime.training import preparing


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bits depend on how many threads compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def states_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a tiny model would stay in host memory, under any budget, and a step would touch no file."""
    plain = preparing.plan_room

    def plan_room(*args: Any, **options: Any) -> Any:
        return replace(plain(*args, **options), resident=frozenset())

    monkeypatch.setattr(preparing, "plan_room", plan_room)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ZOO["llama"].save(tmp_path_factory.mktemp("good") / "llama")


@pytest.fixture
def place(tmp_path: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Place]:
    """A place to do damage in, which must be as empty afterwards as before."""
    before = set(threading.enumerate())
    files = set(os.listdir("/proc/self/fd"))
    where = Place(tmp_path, good, capsys)
    yield where
    assert list(where.scratch.iterdir()) == [], "something was left in the scratch folder"
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint", "scratch", "elsewhere", "pwned"}
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left == set()
    assert set(os.listdir("/proc/self/fd")) <= files
