"""Steps of training on the simulated clock, against the bounds of docs/training.md: never below them, and at them where
one thing takes much longer than all others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.scheduler.cost import CostModel
from penstock.scheduler.curves import Curve
from penstock.scheduler.hardware import Drive, Hardware, Link, Processor
from penstock.scheduler.schedule import TaskGraph
from penstock.scheduler.stepload import BlockUse, Home, LoadedBlock, StepLoad, StepPrediction, UpdateWork
from penstock.scheduler.trainstep import predict
from penstock.scheduler.updatework import update_s

ELEMENTS = 1_000_000
"""Of a block."""


def machine(*, read: float = 1e9, write: float = 5e8, mixed: float = 1.0, link: float | None = None) -> Hardware:
    def processor(name: str) -> Processor:
        flat = Curve.flat(1e10)
        return Processor(name=name, memory_nbytes=2**40, memory=flat, linear={"float32": flat}, attention={})

    return Hardware(
        name="paper",
        cpu=processor("cpu"),
        gpu=processor("gpu") if link else None,
        link=Link(h2d=Curve.flat(link), d2h=Curve.flat(link)) if link else None,
        host_nbytes=2**40,
        drives=(Drive(name="disk", read=Curve.flat(read), write=Curve.flat(write), mixed=mixed),),
    )


def load(
    layers: int = 20,
    *,
    forward: float = 0.01,
    home: Home = "host",
    states_in_memory: bool = False,
    spilled: bool = False,
    segments: bool = False,
    frozen: bool = False,
    **more: Any,
) -> StepLoad:
    """Layers of one block each; backward takes twice as long as forward."""
    kept = 4 if more.get("accumulate", 1) > 1 else 2
    trained: dict[str, Any] = {
        "elements": ELEMENTS,
        "states_nbytes": 12 * ELEMENTS,
        "states_moved_nbytes": 0 if states_in_memory else 12 * ELEMENTS,
        "gradient_nbytes": 2 * ELEMENTS,
        "kept_nbytes": kept * ELEMENTS,
        "spilled_nbytes": kept * ELEMENTS if spilled else 0,
        "spilled_read_nbytes": kept * ELEMENTS if spilled else 0,
        "written_nbytes": 0 if home == "host" else 2 * ELEMENTS,
    }
    blocks = {
        number: LoadedBlock(
            id=number,
            home=home,
            read_nbytes=2 * ELEMENTS,
            weights_nbytes=2 * ELEMENTS,
            **({} if frozen else trained),
        )
        for number in range(1, layers + 1)
    }
    return StepLoad(
        **{
            "blocks": blocks,
            "uses": tuple(
                BlockUse(blocks=(number,), forward_s=forward, again_s=forward, backward_s=2 * forward, saved=True)
                for number in blocks
            ),
            "segments": tuple((index, index + 1) for index in range(layers)) if segments else (),
            "slots": 4 if home == "disk" else 0,
            "separate": False,
            "arrays": 3,
            "update": UpdateWork(nbytes=96.0, operations=10, elements=2**18),
            "shard_elements": 2**20,
            "buffers": 4,
            "behind": 3,
            "leaving_nbytes": 2**26,
            **more,
        }
    )


def with_device(asked: StepLoad, part: float) -> StepLoad:
    """The same, with so much of each block updated by the device."""
    return replace(
        asked, blocks={n: replace(b, elements_there=round(part * b.elements)) for n, b in asked.blocks.items()}
    )


def parts(asked: StepLoad, cost: CostModel) -> tuple[float, float, float, float]:
    """Forward, backward with what a gradient takes to be put by, update with its checks, and the norm."""
    passes = asked.accumulate
    again = sum(asked.uses[i].forward_s for start, stop in asked.segments for i in range(start, stop))
    forward = passes * sum(use.forward_s for use in asked.uses)
    trained = asked.trained()
    put = sum((passes * b.gradient_nbytes + (2 * passes - 1) * b.kept_nbytes) / 1e10 for b in trained)
    backward = passes * (again + sum(use.backward_s for use in asked.uses)) + put
    update = sum(
        update_s(asked.update, cost, b.elements, arrays=asked.arrays, checked_nbytes=b.states_moved_nbytes)
        for b in trained
    )
    norm = sum(b.norm_nbytes for b in trained) / 1e10 if asked.updates == "step" else 0.0
    return forward, backward, update, norm


def moved_s(found: StepPrediction, hardware: Hardware) -> float:
    """Seconds of the drive for all that a step reads and writes."""
    drive = hardware.drives[0]
    each = found.traffic.read / drive.read.best + found.traffic.written / drive.write.best
    return each / max(1.0, drive.mixed)


HOMES = st.sampled_from(["host", "disk"])


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 8),
    home=HOMES,
    read=st.floats(1e7, 1e11),
    forward=st.floats(1e-4, 0.2),
    mixed=st.sampled_from([0.7, 1.0, 1.4]),
    updates=st.sampled_from(["step", "backward"]),
    segments=st.booleans(),
    accumulate=st.integers(1, 5),
    states_in_memory=st.booleans(),
    spilled=st.booleans(),
)
@example(  # where writes pile up until the fourth step
    layers=3, home="host", read=1e7, forward=0.125, mixed=1.0, updates="backward", segments=False, accumulate=3,
    states_in_memory=False, spilled=False,
)  # fmt: skip
def test_no_step_is_faster_than_its_bound_or_slower_than_one_thing_after_another(
    layers: int, home: Home, read: float, forward: float, mixed: float, updates: Any, segments: bool, accumulate: int,
    states_in_memory: bool, spilled: bool,
) -> None:  # fmt: skip
    hardware = machine(read=read, write=read / 2, mixed=mixed)
    asked = load(
        layers, forward=forward, home=home, updates=updates, segments=segments, accumulate=accumulate,
        states_in_memory=states_in_memory, spilled=spilled and (updates == "step" or accumulate > 1),
    )  # fmt: skip
    cost = CostModel(hardware=hardware)
    found = predict(asked, cost)
    f, b, u, norm = parts(asked, cost)
    moved = moved_s(found, hardware)
    # where updates begin in backward the fourth step is not quite like the fifth: writes still pile up a little
    assert found.seconds >= max(f + b + u + norm, moved) * (1 - (1e-9 if updates == "step" else 1e-3))
    if updates == "step":  # nothing is updated before the last gradient is there, or after the next one's first
        states = 0 if states_in_memory else 12 * ELEMENTS
        late = min(layers, asked.buffers) * states * 2 / read  # what is written last is waited for by the next update
        gradients = 2 * ELEMENTS * (2 if accumulate > 1 else 1) if spilled else 0
        updated = (layers * (states * 3 / read + gradients / read) - late) / max(1.0, mixed)
        assert found.seconds >= (b + norm + max(f + u, f * (accumulate - 1) / accumulate + updated)) * (1 - 1e-9)
    assert found.seconds <= (f + b + u + norm + moved_s(found, hardware) * max(1.0, mixed) / min(1.0, mixed)) * 1.001
    assert found.forward_s + found.backward_s + found.update_s == pytest.approx(found.seconds)


@pytest.mark.parametrize("updates", ["step", "backward"])
def test_on_a_fast_disk_a_step_is_all_that_the_cores_do(updates: Any) -> None:
    cost = CostModel(hardware=machine(read=1e13, write=1e13))
    asked = load(home="disk", updates=updates, segments=True)
    assert predict(asked, cost).seconds == pytest.approx(sum(parts(asked, cost)), rel=0.01)


def test_on_a_slow_disk_updates_in_backward_leave_it_no_rest() -> None:
    hardware = machine(read=1e8, write=1e8)
    found = predict(load(updates="backward", forward=1e-3), CostModel(hardware=hardware))
    assert found.seconds == pytest.approx(moved_s(found, hardware), rel=0.03)
    assert found.binds == "disk"


def test_on_a_slow_disk_a_clipped_step_is_backward_and_then_the_disk() -> None:
    hardware = machine(read=1e8, write=1e8)
    cost = CostModel(hardware=hardware)
    asked = load(forward=0.02)
    _, backward, _, norm = parts(asked, cost)
    found = predict(asked, cost)
    assert found.seconds == pytest.approx(backward + norm + moved_s(found, hardware), rel=0.05)


def test_a_large_batch_hides_all_transfers() -> None:
    hardware = machine(link=1e10)
    asked = load(forward=10.0, home="disk", separate=True, host_slots=3, segments=True, updates="backward")
    found = predict(asked, CostModel(hardware=hardware))
    computing = sum(use.forward_s * 2 + use.backward_s for use in asked.uses)
    assert found.binds == "GPU"
    assert computing <= found.busy_s["GPU"] == pytest.approx(computing, rel=1e-3)  # and the norms
    assert found.seconds == pytest.approx(computing, rel=0.01)


def test_what_a_step_moves_is_what_the_page_says() -> None:
    found = predict(load(home="disk", segments=True), CostModel(hardware=machine()))
    count = 20 * ELEMENTS
    assert found.traffic.states_read == found.traffic.states_written == 12 * count
    assert found.traffic.weights_written == 2 * count
    # forward, and again; what the ring holds when it turns round is not read twice
    assert found.traffic.weights_read == 2 * count + 2 * (count - 4 * ELEMENTS)
    assert found.traffic.read / count <= 16
    spilled = predict(load(spilled=True), CostModel(hardware=machine()))
    assert spilled.traffic.gradients_read == spilled.traffic.gradients_written == 2 * count
    wide = predict(load(spilled=True, accumulate=5), CostModel(hardware=machine()))
    assert wide.traffic.gradients_written == 5 * 4 * count
    assert wide.traffic.gradients_read == 5 * 4 * count
    assert wide.traffic.states_written == 12 * count
    early = predict(load(spilled=True, accumulate=5, updates="backward"), CostModel(hardware=machine()))
    assert early.traffic.gradients_written == early.traffic.gradients_read == 4 * 4 * count
    resident = predict(load(states_in_memory=True), CostModel(hardware=machine()))
    assert resident.traffic.read == resident.traffic.written == 0


def test_frozen_blocks_are_read_and_never_written() -> None:
    found = predict(load(home="disk", frozen=True, segments=True), CostModel(hardware=machine()))
    assert found.traffic.read > 0
    assert found.traffic.written == 0


def test_weights_that_stay_on_a_device_apart_come_back_by_way_of_the_disk() -> None:
    found = predict(load(home="device", separate=True, host_slots=2), CostModel(hardware=machine(link=1e9)))
    count = 20 * ELEMENTS
    assert found.traffic.weights_written == found.traffic.weights_read == found.traffic.to_device == 2 * count
    kept = predict(load(home="host", separate=True, host_slots=2, slots=3), CostModel(hardware=machine(link=1e9)))
    assert kept.traffic.weights_written == kept.traffic.weights_read == 0
    assert kept.traffic.to_device == pytest.approx(2 * 2 * count, rel=0.15)
    assert kept.traffic.from_device == 2 * count


def test_accumulated_passes_between_the_first_and_the_last_are_not_simulated_one_by_one() -> None:
    cost = CostModel(hardware=machine())
    six, ten = (predict(load(home="disk", segments=True, accumulate=count), cost) for count in (6, 10))
    alone = sum(use.forward_s * 2 + use.backward_s for use in load().uses)
    assert 4 * alone <= ten.seconds - six.seconds <= 4 * alone * 1.5
    five = predict(load(home="disk", segments=True, accumulate=5), cost)
    for moved in ("weights_read", "weights_written", "states_read"):
        values = [getattr(each.traffic, moved) for each in (five, six, ten)]
        assert values[2] - values[1] == pytest.approx(4 * (values[1] - values[0]))
    assert ten.busy_s["CPU"] - six.busy_s["CPU"] == pytest.approx(4 * (six.busy_s["CPU"] - five.busy_s["CPU"]))


def test_a_rate_may_depend_on_the_lanes_at_work() -> None:
    graph = TaskGraph({"drive": lambda lanes: 0.5 if len(lanes) > 1 else 1.0})
    graph.add("read", "read", 2.0, shared="drive", nbytes=2.0)
    graph.add("write", "write", 1.0, shared="drive", nbytes=1.0)
    # together each has a quarter of a second per second: the write ends at 4, the read has 1 left
    assert graph.simulate().end == (5.0, 4.0)


@pytest.mark.parametrize("states_in_memory", [True, False])
def test_shards_that_the_device_updates_cross_the_link_and_leave_the_cpu(states_in_memory: bool) -> None:
    """The CPU's part is half of what it was; what crosses is arrays and gradients there, arrays and weights back."""
    cost = CostModel(hardware=machine(link=1e12))
    asked = load(home="host", states_in_memory=states_in_memory, separate=True, slots=4)
    alone = predict(asked, cost)
    half = predict(with_device(asked, 0.5), cost)
    crosses = 14 * ELEMENTS * 20 / 2
    assert half.traffic.to_device - alone.traffic.to_device == pytest.approx(crosses)
    assert half.traffic.from_device - alone.traffic.from_device == pytest.approx(crosses)
    assert half.traffic.read == pytest.approx(alone.traffic.read)
    assert half.traffic.written == pytest.approx(alone.traffic.written)
    kernel = 20 / 2 * update_s(asked.update, cost, ELEMENTS, arrays=asked.arrays)
    assert alone.busy_s["CPU"] - half.busy_s["CPU"] == pytest.approx(kernel)
    assert half.busy_s["GPU"] > alone.busy_s["GPU"]


def test_a_step_that_the_update_bounds_is_shorter_where_the_device_takes_half_of_it() -> None:
    cost = CostModel(hardware=machine(link=1e12))
    asked = load(forward=1e-4, home="host", states_in_memory=True, separate=True, slots=4)
    alone = predict(asked, cost).seconds
    assert predict(with_device(asked, 0.5), cost).seconds < 0.6 * alone


def test_weights_on_the_device_with_a_home_in_memory_move_nothing_over_the_drive() -> None:
    cost = CostModel(hardware=machine(link=1e12))
    asked = load(home="device", states_in_memory=True, separate=True)
    blocks = {number: replace(each, homed=True, written_nbytes=0) for number, each in asked.blocks.items()}
    homed = replace(asked, blocks=blocks)
    assert homed.held_nbytes("host") == homed.held_nbytes("device") == asked.held_nbytes("device")
    assert predict(asked, cost).traffic.weights_written == pytest.approx(2 * ELEMENTS * 20)
    found = predict(homed, cost)
    assert found.traffic.read == found.traffic.written == 0
    assert found.traffic.to_device == pytest.approx(2 * ELEMENTS * 20)


@pytest.mark.parametrize("updates", ["step", "backward"])
def test_backward_on_a_device_apart_goes_on_while_gradients_leave(updates: Any) -> None:
    """A block takes 20 ms of backward and 1 ms for its norm; its gradients leave in 2 ms."""
    cost = CostModel(hardware=machine(link=1e9))
    asked = load(home="host", states_in_memory=True, separate=True, slots=30, updates=updates, behind=30)
    found = predict(asked, cost)
    assert found.backward_s == pytest.approx(20 * 0.021, rel=0.01)
    assert found.busy_s["device-to-host link"] == pytest.approx(20 * 0.002)


def test_backward_waits_for_a_slow_link_where_many_gradients_are_held() -> None:
    """They leave in 40 ms each; two of them may wait for that."""
    cost = CostModel(hardware=machine(link=5e7))
    asked = load(home="host", states_in_memory=True, separate=True, slots=30)
    held = predict(replace(asked, leaving_nbytes=4 * ELEMENTS), cost)
    free = predict(replace(asked, leaving_nbytes=2**40), cost)
    assert held.backward_s == pytest.approx(0.021 + 18 * 0.04, rel=0.01)
    assert free.backward_s == pytest.approx(20 * 0.021, rel=0.01)
    assert free.seconds == pytest.approx(held.seconds, rel=0.02)  # `step()` waits for all of them


def test_sums_are_added_up_beside_backward_on_a_device_apart() -> None:
    """Adding takes the CPU 1 ms of each block, less than backward does; the last pass takes norms there, too."""
    cost = CostModel(hardware=machine(link=1e11))
    asked = load(home="host", states_in_memory=True, separate=True, slots=30, accumulate=3)
    found = predict(asked, cost)
    assert found.backward_s == pytest.approx(3 * 20 * 0.02, rel=0.01)
    assert found.traffic.from_device == 3 * 2 * ELEMENTS * 20
