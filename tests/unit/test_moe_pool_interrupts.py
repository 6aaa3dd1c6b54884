"""A layer of experts that is interrupted before any line: slots, cache and carrier agree again with the next one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import pytest
from test_moe_pool import BLOCKS, PARTS, ROUTING, Shelves, compute, event, make

from penstock.memory.arena import PAGE, AnyArena, Slot
from penstock.scheduler.experts import cache, layerpass, pool, shelf
from penstock.scheduler.experts.cache import CacheSetting
from penstock.scheduler.experts.policies.policy import Policy
from penstock.scheduler.experts.pool import ExpertPool
from penstock.scheduler.experts.shelf import HostShelf

FILES = {module.__file__ for module in (cache, layerpass, pool, shelf)}
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


@dataclass(eq=False)
class Hosted(Shelves):
    """The same with host memory below it."""

    host: dict[int, Slot] = field(default_factory=dict)
    """By block, of what lies there."""
    busy: bool = False
    """Whether copies of all that lies there are under way."""

    def bring(
        self,
        places: Sequence[tuple[int, Slot]],
        gone: Sequence[int] = (),
        *,
        kept: Sequence[tuple[int, Slot]] = (),
        urgent: bool = True,
    ) -> list[int]:
        super().bring(places, gone, urgent=urgent)
        taken = [each for each in kept if each[0] not in self.host]
        for block, slot in taken:
            assert slot.offset not in {other.offset for other in self.host.values()}, "two blocks in one slot"
            self.host[block] = slot
        return [block for block, _ in taken]

    def let_go(self, blocks: Sequence[int]) -> list[int]:
        free = [block for block in blocks if block not in self.host or not self.busy]
        for block in free:
            self.host.pop(block, None)
        return free


def beside(capacity: int, passing: int, held: int) -> tuple[ExpertPool, Hosted, HostShelf]:
    """A pool of a device apart, and host memory for so many experts."""
    arena = AnyArena(tier="host", nbytes=PAGE * held * PARTS)
    shelves = Hosted(strict=False)
    made: list[HostShelf] = []

    def below(ranks: Policy) -> HostShelf:
        made.append(
            HostShelf(
                routing=ROUTING,
                setting=CacheSetting(capacity=held),
                policy=ranks,
                blocks=BLOCKS,
                slots=[[arena.cut(PAGE) for _ in range(held)] for _ in range(PARTS)],
                let_go=shelves.let_go,
            )
        )
        return made[0]

    found, _ = make(capacity, passing, apart=True, shelves=shelves, shelf=below)
    return found, shelves, made[0]


def host_agrees(below: HostShelf, shelves: Hosted, slots: int) -> None:
    held = {int(numbers[place]) for place in zip(*below.held.nonzero(), strict=True) for numbers in BLOCKS}
    assert held == below._lying.keys() <= shelves.host.keys()
    assert len(held) == PARTS * below.cache.statistics().held
    known = below._lying | below._leaving
    assert len(known) == len(below._lying) + len(below._leaving)
    assert all(known[block][1] is slot for block, slot in shelves.host.items())
    for part, free in enumerate(below._free):
        offsets = [slot.offset for slot in free] + [slot.offset for at, slot in known.values() if at == part]
        assert len(offsets) == len(set(offsets)) == slots


@pytest.mark.parametrize("busy", [False, True], ids=["still", "copied"])
def test_host_memory_loses_no_slot_wherever_a_layer_was_interrupted(busy: bool) -> None:
    at = 0
    while True:
        found, shelves, below = beside(3, 2, 6)
        for step, layer, experts in ((0, 0, [1, 4]), (0, 1, [2, 3, 5]), (0, 2, [1, 2]), (1, 0, [0, 1])):
            compute(found, event(layer, experts, step=step))
        shelves.busy = busy
        if not struck(found, at, [0, 1, 5], [1, 2], prefill=False):
            break
        shelves.busy = False
        for step in (2, 3):
            for layer in range(ROUTING.layers):
                compute(found, event(layer, [0, 1, 2, 5], step=step))
        agree(found, shelves, 3 + 2)
        host_agrees(below, shelves, 6)
        at += 1
    assert at > 100
