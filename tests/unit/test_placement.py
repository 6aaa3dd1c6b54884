"""Placements against brute force, against the rules that others go by, and in reasonable time."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.scheduler.placement.arrangement import spread
from penstock.scheduler.placement.place import place
from penstock.scheduler.placement.problem import MODES, BlockClass, Counts, Problem, Rates, Rings, Use
from penstock.scheduler.placement.rules import HEURISTICS

sizes = st.integers(1, 20)
uses = st.builds(
    Use,
    device_s=st.floats(0, 5),
    cpu_s=st.floats(0, 30),
    on_cpu=st.booleans(),
    times=st.sampled_from([0.0, 0.1, 1.0, 3.0]),
)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    first, classes = 0, []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(1, 4))
        nbytes = draw(sizes)
        classes.append(
            BlockClass(
                blocks=tuple(range(first, first + count)),
                front_nbytes=nbytes,
                host_nbytes=nbytes,
                read_nbytes=nbytes,
                copied_nbytes=nbytes,
                uses=(draw(uses), draw(uses)),
            )
        )
        first += count
    return Problem(
        classes=tuple(classes),
        device_nbytes=draw(st.integers(0, 120)),
        host_nbytes=draw(st.integers(0, 120)),
        rates=Rates(
            disk=draw(st.floats(0.5, 20)),
            link=draw(st.floats(0.5, 20)),
            dram=draw(st.floats(1, 100)),
            overhead_s=draw(st.sampled_from([0.0, 0.5])),
        ),
        weights=(1.0, draw(st.floats(0.1, 20))),
        overlapped=draw(st.booleans()),
    )


def rings_of(problem: Problem) -> list[Rings]:
    largest = max(each.front_nbytes for each in problem.classes)
    return [
        Rings(front_slots=front, front_slot_nbytes=largest, back_slots=back, back_slot_nbytes=largest)
        for front in (0, 2, 3)
        for back in (1, 2)
    ]


def every(problem: Problem) -> itertools.product[tuple[tuple[int, ...], ...]]:
    """All counts that there are."""
    by_class = []
    for each in problem.classes:
        count = len(each.blocks)
        by_class.append([row for row in itertools.product(range(count + 1), repeat=len(MODES)) if sum(row) == count])
    return itertools.product(*by_class)  # type: ignore[return-value]


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_placement_is_better(problem: Problem) -> None:
    best = None
    for rings in rings_of(problem):
        for counts in every(problem):
            found: Counts = tuple(counts)  # type: ignore[arg-type]
            if problem.fits(found, rings):
                seconds = problem.seconds(found)
                best = seconds if best is None else min(best, seconds)
    placed = place(problem, rings_of(problem))
    assert (placed is None) == (best is None)
    if placed is not None and best is not None:
        assert placed.seconds <= best * (1 + 1e-5) + 1e-9


@settings(max_examples=100, deadline=None)
@given(problems())
def test_a_plan_is_never_worse_than_a_rule(problem: Problem) -> None:
    placed = place(problem, rings_of(problem))
    for rings in rings_of(problem):
        for heuristic in HEURISTICS.values():
            counts = heuristic(problem, rings)
            if problem.fits(counts, rings):
                assert placed is not None
                assert placed.seconds <= problem.seconds(counts) * (1 + 1e-9)


@given(st.lists(st.integers(0, 12), min_size=4, max_size=4).filter(any))
def test_modes_are_given_as_often_as_planned_and_evenly(row: list[int]) -> None:
    total = sum(row)
    unit = Use(device_s=0)
    each = BlockClass(
        blocks=tuple(range(total)), front_nbytes=1, host_nbytes=1, read_nbytes=1, copied_nbytes=1, uses=(unit,)
    )
    modes = spread([each], (tuple(row),))
    assert [sum(mode == wanted for mode in modes.values()) for wanted in MODES] == row
    for place_, wanted in enumerate(MODES):  # of every first part, a mode has its share, but for a few
        given_ = 0
        for position in range(total):
            given_ += modes[position] == wanted
            assert abs(given_ - row[place_] * (position + 1) / total) <= 2


def test_a_large_model_is_planned_as_a_small_one() -> None:
    problem, choices = large_model(layers=120, experts=256)
    placed = place(problem, choices)
    assert placed is not None
    counts = [[sum(placed.modes[b] == m for b in each.blocks) for m in MODES] for each in problem.classes]
    assert problem.fits(tuple(tuple(row) for row in counts), placed.rings)
    assert placed.seconds == problem.seconds(tuple(tuple(row) for row in counts))
    # the disk binds: nothing of the memory that would spare it reading is left
    host = placed.rings.back_nbytes + sum(
        (row[1] + row[2]) * each.host_nbytes for row, each in zip(counts, problem.classes, strict=True)
    )
    assert problem.host_nbytes - host < 18 * 2**20


def large_model(*, layers: int, experts: int) -> tuple[Problem, list[Rings]]:
    """A mixture of experts of several terabytes, on a machine with a GPU."""
    first, classes = 0, []
    for count, mib in ((layers, 90), (layers, 12), (layers * experts, 18), (2, 2000)):
        nbytes = mib * 2**20
        classes.append(
            BlockClass(
                blocks=tuple(range(first, first + count)),
                front_nbytes=nbytes,
                host_nbytes=nbytes,
                read_nbytes=nbytes,
                copied_nbytes=nbytes,
                uses=(Use(device_s=nbytes / 1e12), Use(device_s=nbytes / 1e12, cpu_s=nbytes / 1e11, on_cpu=True)),
            )
        )
        first += count
    problem = Problem(
        classes=tuple(classes),
        device_nbytes=24 * 2**30,
        host_nbytes=128 * 2**30,
        rates=Rates(disk=7e9, link=25e9, dram=8e10),
        weights=(1.0, 64.0),
    )
    slot = 2000 * 2**20
    choices = [
        Rings(front_slots=front, front_slot_nbytes=size, back_slots=2, back_slot_nbytes=slot)
        for size in (slot, 90 * 2**20)
        for front in (2, 4, 8)
    ]
    return problem, choices
