"""The end of a block's change: in which order others hear of it."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

from penstock.runtime.training.blockchanges import BlockChanges, Job
from penstock.runtime.training.shards import SMALL


def test_places_of_gradients_are_given_back_before_anybody_can_make_others() -> None:
    told: list[tuple[str, int]] = []

    def note(what: str) -> Any:
        return lambda block: told.append((what, block))

    executor: Any = SimpleNamespace(readmit=note("weights can be had"))
    weights: Any = SimpleNamespace(end=note("weights are there"))
    kernel: Any = None
    changes = BlockChanges(executor=executor, shards=(), names=(), weights=weights, kernel=kernel)
    changes.on_used, changes.on_done = note("gradients are used"), note("done")
    step: Any = None
    for block in (SMALL + 3, SMALL):
        job = Job(step=step, block=block, left=deque(), open=2)
        changes._end_shard(job)
        assert told == []
        changes._end_shard(job)
        expected = ["weights are there", "gradients are used", "weights can be had", "done"]
        assert told == [(what, block) for what in expected if block != SMALL or what != "weights can be had"]
        told.clear()
