"""Where activations go: against brute force on small cases, and what must hold on any."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.scheduler.activations import (
    GRAIN,
    Lane,
    Part,
    Pass,
    Place,
    Placement,
    Saved,
    Tier,
    place_activations,
)

DISK: tuple[Place, ...] = ("keep", "disk")
THREE: tuple[Place, ...] = ("keep", "host", "disk")
LANES = {
    "keep": (),
    "host": ("out", "in"),
    "disk": ("out", "in", "drive"),
}


def machine(
    saved: Sequence[Saved],
    *,
    rooms: dict[Place, float],
    busy: dict[str, float] | None = None,
    byte_s: dict[str, float] | None = None,
    compute_s: float = 10.0,
    carrying: dict[Place, float] | None = None,
) -> Pass:
    rates = byte_s or {"out": 1e-6, "in": 1e-6, "drive": 4e-6}
    return Pass(
        saved=saved,
        tiers=[
            Tier(place=place, room_nbytes=room, lanes=LANES[place], processor_byte_s=(carrying or {}).get(place, 0.0))
            for place, room in rooms.items()
        ],
        lanes={name: Lane(busy_s=(busy or {}).get(name, 0.0), byte_s=rate) for name, rate in rates.items()},
        compute_s=compute_s,
    )


def seconds_of(work: Pass, where: Sequence[Place | None]) -> float | None:
    """Of a pass in which each goes to one place as a whole, or is made again; None where there is no room."""
    again = 0.0
    lanes = {name: lane.busy_s for name, lane in work.lanes.items()}
    carrying = {tier.place: tier.processor_byte_s for tier in work.tiers}
    used = dict.fromkeys((tier.place for tier in work.tiers), 0)
    for each, place in zip(work.saved, where, strict=True):
        if place is None:
            if each.seconds == inf:
                return None
            again += each.seconds
            continue
        if each.after is not None and where[each.after] is None:
            return None
        used[place] += each.nbytes
        again += carrying[place] * each.nbytes
        for name in LANES[place]:
            lanes[name] += each.nbytes * work.lanes[name].byte_s
    if any(used[tier.place] > tier.room_nbytes for tier in work.tiers):
        return None
    return max(work.compute_s + again, *lanes.values())


def brute_force(work: Pass) -> float:
    places: list[Place | None] = [None, *(tier.place for tier in work.tiers)]
    found = [seconds_of(work, where) for where in itertools.product(places, repeat=len(work.saved))]
    return min(seconds for seconds in found if seconds is not None)


@st.composite
def alike(draw: st.DrawFn) -> Pass:
    """Tensors of one size, which differ in what they save; rooms that hold whole ones."""
    count = draw(st.integers(1, 5))
    seconds = draw(st.lists(st.integers(1, 20), min_size=count, max_size=count))
    saved = [Saved(nbytes=GRAIN * 10, seconds=float(each)) for each in seconds]
    rooms: dict[Place, float] = {place: draw(st.integers(0, 3)) * GRAIN * 10.0 for place in THREE}
    busy = {name: float(draw(st.integers(0, 40))) for name in ("out", "in", "drive")}
    byte_s = {name: draw(st.sampled_from([0.0, 1e-5, 1e-4])) for name in ("out", "in", "drive")}
    carrying: dict[Place, float] = {"disk": draw(st.sampled_from([0.0, 1e-5, 1e-4, 1e-3]))}
    return machine(saved, rooms=rooms, busy=busy, byte_s=byte_s, carrying=carrying)


@settings(max_examples=150, deadline=None)
@given(alike())
def test_tensors_of_one_size_are_placed_as_well_as_can_be_but_for_one(work: Pass) -> None:
    """The last one that would go may be too much for a lane, where less of it would not be: never more than that."""
    found = place_activations(work)
    best = brute_force(work)
    step = max((each.seconds for each in work.saved), default=0.0)
    assert best - 1e-9 <= found.seconds <= best + step + 1e-9
    if not any(lane.byte_s for lane in work.lanes.values()):
        assert found.seconds == pytest.approx(best)


@st.composite
def anything(draw: st.DrawFn) -> Pass:
    count = draw(st.integers(0, 5))
    saved = [
        Saved(
            nbytes=draw(st.integers(1, 40 * GRAIN)),
            seconds=draw(st.sampled_from([0.0, 1.0, 5.0, 30.0, inf])),
            after=draw(st.sampled_from([None, index - 1])) if index else None,
        )
        for index in range(count)
    ]
    rooms: dict[Place, float] = {
        place: draw(st.one_of(st.integers(0, 60 * GRAIN), st.just(inf)))
        for place in draw(st.sampled_from([DISK, THREE]))
    }
    busy = {name: float(draw(st.integers(0, 20))) for name in ("out", "in", "drive")}
    carrying: dict[Place, float] = {"disk": draw(st.sampled_from([0.0, 1e-6, 1e-4]))}
    return machine(saved, rooms=rooms, busy=busy, compute_s=float(draw(st.integers(0, 20))), carrying=carrying)


def used(found: Placement, place: Place) -> int:
    return found.nbytes_at(place)


@settings(max_examples=300, deadline=None)
@given(anything())
def test_what_holds_of_every_decision(work: Pass) -> None:
    found = place_activations(work)
    beyond = 0
    for index, each in enumerate(work.saved):
        parts = found.parts.get(index)
        if parts is None:
            assert each.seconds < inf  # what cannot be made again is somewhere
            continue
        assert sum(part.nbytes for part in parts) == each.nbytes
        assert each.seconds == inf or each.after is None or each.after in found.parts
        assert all(part.nbytes > 0 for part in parts)
        assert all(part.nbytes % GRAIN == 0 for part in parts[:-1])
        order = [THREE.index(part.place) for part in parts]
        assert order == sorted(set(order))
    for tier in work.tiers:
        over = max(0.0, used(found, tier.place) - tier.room_nbytes)
        beyond += int(over) if tier.place == "keep" else 0
        assert tier.place == "keep" or not over
    assert beyond <= found.beyond_nbytes
    must = [index for index, each in enumerate(work.saved) if each.seconds == inf]
    if not must:
        assert found.seconds <= found.plain_s  # nothing is moved that makes the pass longer
        assert found.beyond_nbytes == 0


@settings(max_examples=150, deadline=None)
@given(anything())
def test_the_seconds_are_those_of_the_decision(work: Pass) -> None:
    found = place_activations(work)
    again = carried = 0.0
    lanes = {name: lane.busy_s for name, lane in work.lanes.items()}
    carrying = {tier.place: tier.processor_byte_s for tier in work.tiers}
    for index, each in enumerate(work.saved):
        if index not in found.parts:
            again += each.seconds
        for part in found.parts.get(index, ()):
            carried += part.nbytes * carrying.get(part.place, 0.0)
            for name in LANES[part.place]:
                lanes[name] += part.nbytes * work.lanes[name].byte_s
    assert found.again_s == pytest.approx(again)
    assert found.carrying_s == pytest.approx(carried)
    assert found.seconds == pytest.approx(max(work.compute_s + again + carried, *lanes.values()))


@settings(max_examples=100, deadline=None)
@given(anything(), st.sampled_from(["out", "in", "drive"]))
def test_nothing_goes_over_a_lane_that_is_the_bound(work: Pass, bound: str) -> None:
    lanes = {**work.lanes, bound: Lane(busy_s=1000.0, byte_s=work.lanes[bound].byte_s)}
    free = [replace(each, seconds=min(each.seconds, 30.0)) for each in work.saved]
    found = place_activations(replace(work, saved=free, lanes=lanes))
    barred = [place for place, passed in LANES.items() if bound in passed]
    assert all(used(found, place) == 0 for place in barred)  # type: ignore[arg-type]


def layers(count: int) -> list[Saved]:
    """Of each layer a product of a wide matrix, one of a narrow one, and a sum."""
    found = []
    for _ in range(count):
        first = len(found)
        found.append(Saved(nbytes=10 * GRAIN, seconds=40.0))
        found.append(Saved(nbytes=10 * GRAIN, seconds=10.0, after=first))
        found.append(Saved(nbytes=10 * GRAIN, seconds=0.01, after=first + 1))
    return found


def test_room_goes_to_what_saves_most_per_byte_and_of_that_to_the_last_layers() -> None:
    found = place_activations(machine(layers(3), rooms={"keep": 40.0 * GRAIN}))
    assert set(found.parts) == {0, 3, 6, 7}
    assert found.again_s == pytest.approx(2 * 10 + 0.03)


def test_of_a_layer_nothing_is_held_without_what_it_comes_after() -> None:
    """The first one has no room; what is held after it would save nothing."""
    saved = [Saved(nbytes=50 * GRAIN, seconds=50.0), Saved(nbytes=5 * GRAIN, seconds=5.0, after=0)]
    assert not place_activations(machine(saved, rooms={"keep": 20.0 * GRAIN})).parts


def test_faster_tiers_are_filled_first_and_the_marginal_one_is_split() -> None:
    found = place_activations(machine(layers(2), rooms={"keep": 13.0 * GRAIN, "host": 12.0 * GRAIN, "disk": inf}))
    assert found.parts[3] == (Part(place="keep", nbytes=10 * GRAIN),)
    assert found.parts[0] == (Part(place="keep", nbytes=3 * GRAIN), Part(place="host", nbytes=7 * GRAIN))
    assert found.parts[4] == (Part(place="host", nbytes=5 * GRAIN), Part(place="disk", nbytes=5 * GRAIN))
    assert found.again_s == pytest.approx(0.0)


def test_nothing_is_split_between_memory_and_making_it_again() -> None:
    found = place_activations(machine(layers(1), rooms={"keep": 15.0 * GRAIN}))
    assert found.parts == {0: (Part(place="keep", nbytes=10 * GRAIN),)}


def test_moving_ends_where_the_drive_would_become_what_the_pass_waits_for() -> None:
    saved = [Saved(nbytes=1000 * GRAIN, seconds=1.0) for _ in range(20)]
    each_s = 1000 * GRAIN * 4e-6
    work = machine(saved, rooms={"disk": inf}, byte_s={"out": 0.0, "in": 0.0, "drive": 4e-6}, compute_s=100.0)
    found = place_activations(work)
    moved = used(found, "disk") // (1000 * GRAIN)
    assert moved * each_s <= found.seconds
    assert found.seconds == pytest.approx(min(max(100.0 + 20 - k, k * each_s) for k in range(21)))


def test_what_cannot_be_made_again_goes_to_the_disk_even_where_that_is_the_bound() -> None:
    saved = [Saved(nbytes=10 * GRAIN, seconds=inf) for _ in range(4)]
    found = place_activations(machine(saved, rooms={"keep": 20.0 * GRAIN, "disk": inf}, busy={"drive": 100.0}))
    assert used(found, "keep") == 20 * GRAIN
    assert {index for index, parts in found.parts.items() if parts[0].place == "keep"} == {2, 3}  # the last are first


def test_where_nothing_has_room_it_is_kept_and_said() -> None:
    saved = [Saved(nbytes=10 * GRAIN, seconds=inf)]
    found = place_activations(machine(saved, rooms={"host": 5.0 * GRAIN}))
    assert found.parts == {0: (Part(place="keep", nbytes=10 * GRAIN),)}
    assert found.beyond_nbytes == 10 * GRAIN


def test_where_the_processor_carries_what_moves_that_has_to_cost_it_less_than_making_again() -> None:
    """Drive and links are free here: only the processor's own seconds decide."""
    saved = [Saved(nbytes=10 * GRAIN, seconds=seconds) for seconds in (4.0, 1.0, 3.0, 2.0)]
    each_s = 2.5
    work = machine(
        saved,
        rooms={"keep": 10.0 * GRAIN, "disk": inf},
        byte_s=dict.fromkeys(("out", "in", "drive"), 0.0),
        carrying={"disk": each_s / (10 * GRAIN)},
    )
    found = place_activations(work)
    assert found.parts == {
        0: (Part(place="keep", nbytes=10 * GRAIN),),
        2: (Part(place="disk", nbytes=10 * GRAIN),),
    }
    assert found.seconds == pytest.approx(10.0 + 1.0 + 2.0 + each_s)
    assert found.carrying_s == pytest.approx(each_s)
    assert found.seconds == pytest.approx(brute_force(work))
