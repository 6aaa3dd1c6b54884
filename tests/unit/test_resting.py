"""Threads that sleep between operations: more of them than cores, while it is wanted."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from penstock.runtime.resting import RestingThreads


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by /proc")
def test_another_team_of_threads_exists_while_it_is_open() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(2**20).mul_(2.0)  # this thread's own team
        there = _threads()
        resting = RestingThreads()
        assert _threads() == there + torch.get_num_threads(), "one that waits, and those that computed with it"
        resting.close()
        resting.close()
        for _ in range(1000):  # the system takes them away a moment after they were joined
            if _threads() <= there:
                break
            time.sleep(0.01)
        assert _threads() <= there, "they end with it"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("threads", "cores", "wanted"), [(1, 1, False), (2, 2, True), (2, 4, False), (4, 2, True)])
def test_it_is_wanted_where_operations_take_all_cores(
    threads: int, cores: int, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert RestingThreads.wanted() is wanted
