"""What training asks of a calibration besides: attention's backward, and threads that have to be roused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fakeclock import FakeClock

from penstock.runtime.calibration import attention, rouse
from penstock.runtime.calibration.attention import LENGTHS, attention_back_curve
from penstock.runtime.calibration.rouse import rouse_cost
from penstock.runtime.calibration.timing import HostTimer
from penstock.scheduler.cost import GRAIN_NBYTES, CostModel
from penstock.scheduler.curves import Curve
from penstock.scheduler.hardware import ATTENTION_BACK, Hardware, Processor
from penstock.scheduler.operations import Operation

CPU = torch.device("cpu")
CALLS = 10


def test_attention_goes_backward_at_known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()

    def grad(result: torch.Tensor, inputs: list[torch.Tensor], gradient: torch.Tensor, *, retain_graph: bool) -> None:
        query, key, value = inputs
        assert query.shape == key.shape == value.shape == result.shape == gradient.shape
        assert retain_graph
        clock.take(2 * key.nbytes / (3e9 / key.shape[2]))

    monkeypatch.setattr(attention.torch.autograd, "grad", grad)
    found = attention_back_curve(CPU, torch.float32, seconds=0.3, timer=HostTimer(clock), clock=clock)
    assert found.x == LENGTHS
    assert found.y == pytest.approx([3e9 / rows for rows in LENGTHS])


def test_attention_that_would_go_backward_for_too_long_has_fewer_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    longest: list[float] = []

    def grad(_: torch.Tensor, inputs: list[torch.Tensor], *rest: torch.Tensor, retain_graph: bool) -> None:
        assert retain_graph
        longest.append(inputs[1].nbytes / 1e7)
        clock.take(longest[-1])

    monkeypatch.setattr(attention.torch.autograd, "grad", grad)
    attention_back_curve(CPU, torch.float32, seconds=0.3, timer=HostTimer(clock), clock=clock, lengths=(128,))
    assert max(longest) <= attention.LONGEST_BACK_S


class Sleepers:
    """A timer of a machine whose threads sleep while another thread of the process has computed."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock

    def seconds(self, work: Callable[[], object]) -> float:
        work()
        others = any(thread.name == "penstock-calibration-other" for thread in threading.enumerate())
        taken = CALLS * (4e-6 if others else 1e-6)
        self._clock.take(taken)
        return taken


def test_rousing_threads_is_what_operations_take_more_beside_another_thread() -> None:
    clock = FakeClock()
    found = rouse_cost(seconds=1e-3, timer=Sleepers(clock), clock=clock, calls=CALLS)
    assert found.value == pytest.approx(3e-6)
    assert not [thread for thread in threading.enumerate() if thread.name == "penstock-calibration-other"]


def test_rousing_threads_takes_no_less_than_nothing() -> None:
    class Same(Sleepers):
        def seconds(self, work: Callable[[], object]) -> float:
            work()
            self._clock.take(1e-5)
            return 1e-5

    clock = FakeClock()
    assert 0 < rouse_cost(seconds=1e-3, timer=Same(clock), clock=clock, calls=CALLS).value <= 1e-9


def test_torch_itself_is_measured() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert min(attention_back_curve(CPU, dtype, seconds=0.01, timer=HostTimer(), lengths=(16, 32)).y) > 0
    assert 0 < rouse_cost(seconds=0.01, timer=HostTimer(), calls=20).value < 0.1
    assert rouse.ELEMENTS * 4 * 2 > GRAIN_NBYTES  # several threads share it


def machine(**more: Any) -> Hardware:
    flat = Curve.flat(1e9)
    cpu = Processor(
        name="a CPU", memory_nbytes=2**30, memory=flat, linear={"float32": flat}, attention={"float32": flat},
        launch_s=1e-6, **more,
    )  # fmt: skip
    return Hardware(name="paper", cpu=cpu, host_nbytes=2**30, drives=())


def test_threads_are_roused_for_operations_that_several_share_and_only_beside_another_one() -> None:
    hardware = machine(rouse_s=1e-5)
    small, large = (Operation(kind="memory", nbytes=2.0 * GRAIN_NBYTES, launches=count) for count in (2, 1))
    product = Operation(kind="linear", nbytes=0.0, rows=1, dtype="float32", launches=3)
    alone, beside = CostModel(hardware=hardware), CostModel(hardware=hardware, beside=True)
    started = [[model.parts_s([each], "cpu")[0] for each in (small, large, product)] for model in (alone, beside)]
    assert started[0] == pytest.approx([2e-6, 1e-6, 3e-6])
    assert started[1] == pytest.approx([2e-6, 1.1e-5, 3.3e-5])


def test_backward_of_attention_is_what_was_measured_of_it_or_follows_from_forward() -> None:
    back = Operation(kind="attention back", nbytes=1e6, rows=1, dtype="float32")
    assert CostModel(hardware=machine()).worked_s(back, "cpu") == pytest.approx(ATTENTION_BACK * 1e-3)
    measured = machine(attention_back={"float32": Curve.flat(1e8)})
    assert CostModel(hardware=measured).worked_s(back, "cpu") == pytest.approx(1e-2)


def test_rates_fall_on_beyond_the_last_point_no_faster_than_arithmetic_does() -> None:
    assert Curve(x=(1.0, 10.0), y=(100.0, 10.0)).onward(1000.0) == pytest.approx(0.1)
    assert Curve(x=(1.0, 10.0), y=(100.0, 1.0)).onward(100.0) == pytest.approx(0.1)  # it fell faster
    assert Curve(x=(1.0, 10.0), y=(1.0, 10.0)).onward(100.0) == 10.0  # what rises is level from there on
    between = Curve(x=(1.0, 100.0), y=(100.0, 10.0))
    assert between.onward(10.0) == between.at(10.0)
    assert Curve.flat(7.0).onward(100.0) == 7.0
