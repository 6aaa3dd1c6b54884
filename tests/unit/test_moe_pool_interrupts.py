"""A layer of experts that is interrupted before any line: slots, cache and carrier agree again with the next one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import pytest
from test_moe_pool import PARTS, ROUTING, Shelves, compute, event, make

from penstock.scheduler.experts import cache, layerpass, pool
from penstock.scheduler.experts.pool import ExpertPool

FILES = {module.__file__ for module in (cache, layerpass, pool)}
LEASES = {"lent", "lend", "give_back", "_acquire", "_is_there"}
"""Where a lease is held: whoever is interrupted between having one and giving it back loses it, here as anywhere."""


class Interrupt:
    """Raises before a line of these files, counted from 0, outside of what has leases."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0
        self.raised = False

    def __call__(self, frame: FrameType, kind: str, argument: Any) -> Any:
        code = frame.f_code
        return self.line if code.co_filename in FILES and code.co_name not in LEASES else None

    def line(self, frame: FrameType, kind: str, argument: Any) -> Any:
        if kind == "line" and not self.raised:
            self.count += 1
            if self.count > self.at:
                self.raised = True
                raise KeyboardInterrupt
        return self.line


def struck(found: ExpertPool, at: int, experts: Sequence[int], ahead: Sequence[int], *, prefill: bool) -> bool:
    """Run a layer that is interrupted; whether it was."""
    interrupt, before = Interrupt(at), sys.gettrace()
    sys.settrace(interrupt)
    try:
        compute(found, event(1, experts, step=1, prefill=prefill), ahead)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return interrupt.raised


def agree(found: ExpertPool, shelves: Shelves, slots: int) -> None:
    held = int(found.cache.held.sum())
    assert held == found.statistics().cache.held
    assert len(shelves.lying) == PARTS * held
    assert shelves.lying == found._lying
    for part, free in enumerate(found._free):
        taken = [slot.offset for block, slot in found._lying.items() if block // ROUTING.total == part]
        assert len(free) == len({slot.offset for slot in free}) == slots - held
        assert not {slot.offset for slot in free} & set(taken)


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize(("capacity", "passing"), [(0, 1), (0, 3), (4, 2), (9, 1)])
def test_the_next_layers_are_right_wherever_one_was_interrupted(capacity: int, passing: int, prefill: bool) -> None:
    at = 0
    while True:
        found, shelves = make(capacity, passing)
        shelves.strict = False
        compute(found, event(0, [1, 4]))
        compute(found, event(1, [2, 3, 5]))
        compute(found, event(0, [0, 1], step=1), ahead=[0, 4])
        if not struck(found, at, [0, 1, 5], [1, 2], prefill=prefill):
            break
        assert not shelves.leased
        for step in (2, 3):  # the carrier checks whose bytes each lease has, and that no slot has two blocks
            for layer in range(ROUTING.layers):
                compute(found, event(layer, [0, 1, 2, 5], step=step))
        agree(found, shelves, capacity + passing)
        at += 1
    assert at > 100
