"""The rules of slots, against a slow model of what the disk would hold."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.memory.arena import PAGE, round_up
from penstock.memory.store.slotmap import BlockSpec, SlotMap, spread
from penstock.memory.store.slots import Slots


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32), blocks=st.integers(1, 3), steps=st.integers(1, 60))
def test_no_write_ever_touches_what_a_manifest_names(seed: int, blocks: int, steps: int) -> None:
    draw = random.Random(seed)
    slots = Slots([None] * blocks)
    disk: dict[tuple[int, int], int] = {}  # what each slot holds: the value that was written last
    committed: dict[int, int] = {}
    waiting: list[dict[int, int]] = []
    running: dict[int, int] = {}
    under_way: dict[int, int] = {}
    value = number = 0
    for _ in range(steps):
        action = draw.choice(["begin", "begin", "land", "cut", "publish", "drop"])
        if action == "begin":
            block = draw.randrange(blocks)
            if block not in slots.writing and slots.target(block) is not None:
                value += 1
                disk[block, slots.begin(block).slot] = value  # from now on the slot's old bytes are gone
                under_way[block] = value
        elif action == "land" and slots.writing:
            block = draw.choice(sorted(slots.writing))
            slots.landed(block, under_way[block])
            running[block] = under_way.pop(block)
        elif action == "cut" and len(slots.cuts) < 3:
            number += 1
            slots.cut(number, b"")
            waiting.append({**running, **under_way})
        elif action == "publish" and slots.cuts and not slots.cuts[0].unlanded:
            slots.publish(slots.cuts[0])
            committed = waiting.pop(0)
        elif action == "drop" and slots.cuts and draw.random() < 0.2:
            slots.drop(slots.cuts[-1])
            waiting.pop()
        named = [(committed, slots.published), *zip(waiting, (cut.copies for cut in slots.cuts), strict=True)]
        for state, copies in named:
            held = {b: disk[b, copy.slot] for b, copy in enumerate(copies) if copy is not None}
            assert held == state
        for block, copy in enumerate(slots.running):
            if copy is not None and block not in slots.writing:
                assert disk[block, copy.slot] == running[block] == copy.checksum


def test_a_write_never_waits_when_nothing_is_being_published() -> None:
    slots = Slots([None])
    for number in range(1, 20):
        for value in range(3):
            assert slots.target(0) is not None
            slots.begin(0)
            slots.landed(0, value)
        slots.publish(slots.cut(number, b""))


def test_versions_are_those_of_the_commit_that_published_first() -> None:
    slots = Slots([None, None])
    slots.begin(0)
    slots.landed(0, 7)
    lost = slots.cut(1, b"")
    slots.begin(1)
    slots.landed(1, 7)
    slots.drop(lost)
    slots.publish(slots.cut(2, b""))
    slots.publish(slots.cut(3, b""))
    assert [copy and copy.version for copy in slots.published] == [2, 2]


@given(
    sizes=st.lists(st.integers(1, 40 * PAGE), min_size=1, max_size=40),
    drives=st.integers(1, 4),
)
def test_slots_do_not_overlap_and_drives_are_even(sizes: list[int], drives: int) -> None:
    specs = tuple(BlockSpec(name=str(i), kind="", nbytes=nbytes) for i, nbytes in enumerate(sizes))
    slotmap = SlotMap(blocks=specs, homes=spread(specs, drives), paths=tuple("abcd"[:drives]))
    taken: dict[str, list[tuple[int, int]]] = {path: [] for path in slotmap.paths}
    for block, nbytes in enumerate(sizes):
        for slot in (0, 1):
            span = slotmap.span(block, slot)
            assert span.nbytes == nbytes
            assert span.offset % PAGE == 0
            taken[span.path].append((span.offset, span.offset + round_up(nbytes)))
    for path, total in zip(slotmap.paths, slotmap.drive_nbytes(), strict=True):
        ordered = sorted(taken[path])
        assert [start for start, _ in ordered] == [0, *(stop for _, stop in ordered)][: len(ordered)], "no gap"
        assert total == max((stop for _, stop in ordered), default=0)
    totals = slotmap.drive_nbytes()
    assert max(totals) - min(totals) <= 2 * round_up(max(sizes))


def test_a_slot_is_not_taken_twice() -> None:
    slots = Slots([None])
    slots.begin(0)
    with pytest.raises(AssertionError):
        slots.begin(0)
