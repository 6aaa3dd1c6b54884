"""Placing blocks for calls that come one at a time, and for those that alternate between the processors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from penstock.runtime.placing import TokenWork, layers_of, place_on_tiers
from penstock.scheduler.cost import CostModel
from penstock.scheduler.curves import Curve
from penstock.scheduler.hardware import Hardware, Link, Processor
from penstock.scheduler.placement.problem import UNHIDDEN

NBYTES = 10**6
MS = 1e-3


def processor(name: str, rate: float) -> Processor:
    return Processor(
        name=name,
        memory_nbytes=2**40,
        memory=Curve.flat(1e15),
        linear={"float32": Curve.flat(rate)},
        attention={"float32": Curve.flat(rate)},
        launch_s=0.0,
        cores=2,
    )


def seconds(*, lanes: int, exact: bool = False) -> float:
    """Of a token of each lane: four blocks stay on the device, four are the CPU's, each takes 1 ms wherever it is."""
    costs = CostModel(
        hardware=Hardware(
            name="made up",
            cpu=processor("cpu", 1e9),
            gpu=processor("gpu", 1e9),
            link=Link(h2d=Curve.flat(1e8), d2h=Curve.flat(1e8), latency_s=0.0),
            host_nbytes=2**40,
            drives=(),
        )
    )
    image = SimpleNamespace(nbytes=NBYTES, read_nbytes=NBYTES, data_nbytes=NBYTES)
    blocks: list[Any] = [
        SimpleNamespace(id=number, name=f"layers.{number}", front_nbytes=NBYTES, image=image) for number in range(8)
    ]
    found = place_on_tiers(
        blocks,
        work=TokenWork(costs=costs, rows=1, dtype="float32", exact=exact, lanes=lanes),
        device_nbytes=6 * NBYTES,
        host_nbytes=2**30,
        worth={},
        min_slots=2,
        depth_nbytes=NBYTES,
        disk_rate=1e6,
    )
    assert found is not None
    front, back, taken_s = found
    assert (len(front.resident), len(back.resident)) == (4, 4)
    return taken_s


def test_one_call_after_the_other_takes_both_processors_times() -> None:
    assert seconds(lanes=1) == pytest.approx(8 * MS, rel=0.01)


def test_lanes_that_alternate_take_the_longer_of_both() -> None:
    """Two lanes: 8 ms on each processor, of which all but a little is at the same time."""
    assert seconds(lanes=2) == pytest.approx((8 + UNHIDDEN * 8) * MS, rel=0.01)
    assert seconds(lanes=4) == pytest.approx(2 * seconds(lanes=2), rel=0.01)


def test_one_processor_copies_once_for_all_lanes() -> None:
    """40 ms on the link, whatever the device does meanwhile."""
    assert seconds(lanes=1, exact=True) == pytest.approx((40 + UNHIDDEN * 8 + 0.4) * MS, rel=0.01)
    assert seconds(lanes=2, exact=True) == pytest.approx((40 + UNHIDDEN * 16 + 0.4) * MS, rel=0.01)


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        # a plain stack, and numbers that are of parts of a layer
        (["model.layers.0.attn", "model.layers.0.mlp.0", "model.layers.0.mlp.2", "model.layers.1"], [0, 0, 0, 1]),
        (["model.layers.3.mlp.experts.5", "model.layers.3.mlp.experts.6", "lm_head"], [0, 0, None]),
        (["encoder.block.0.layer.0", "encoder.block.0.layer.1.DenseReluDense", "encoder.block.1"], [0, 0, 1]),
        # stages of layers, by name and as a list in a list
        (["swin.encoder.layers.0.blocks.0", "swin.encoder.layers.0.blocks.1.mlp", "swin.encoder.layers.1"], [0, 1, 2]),
        (["encoder.stages.1.layers.0.dwconv", "encoder.stages.1.layers.1", "encoder.stages.0.x"], [0, 1, 2]),
        (["encoder.block.0.0.attention", "encoder.block.0.1", "encoder.block.1.0"], [0, 1, 2]),
        (["0.weight", "1.weight", "1.bias"], [0, 1, 1]),
    ],
)
def test_a_layer_is_the_innermost_member_of_a_stack(names: list[str], layers: list[int | None]) -> None:
    found = layers_of([SimpleNamespace(id=number, name=name) for number, name in enumerate(names)])  # type: ignore[misc]
    assert [found.get(number) for number in range(len(names))] == layers
