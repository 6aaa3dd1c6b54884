"""What is foreseen of a CPU that computes beside a device: the blocks that it can, within the host's budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from test_predicted_profile import CONFIG, machine

from penstock.memory.errors import UsageError
from penstock.runtime.explain import Explanation
from penstock.runtime.foresight import Foresight, Room
from penstock.runtime.headroom import kv_nbytes
from penstock.runtime.layout import Budgets
from penstock.runtime.planning import Planner
from penstock.runtime.profiler.metrics import summarise
from penstock.runtime.profiler.predicted import write_prediction
from penstock.runtime.profiler.reader import read_profile
from penstock.runtime.profiler.schema import Step
from penstock.runtime.units import settled
from penstock.scheduler.curves import Curve
from penstock.scheduler.hardware import Hardware

MIB = 2**20


@pytest.fixture
def foresight(tmp_path: Path) -> Foresight:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 20_000}))
    return Foresight(tmp_path)


@pytest.fixture
def layers_only(tmp_path: Path) -> Foresight:
    """The same with a small output layer, which is at the end and has nothing beside it."""
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 64}))
    return Foresight(tmp_path / "layers")


def slow_link() -> Hardware:
    """The CPU computes faster than the link copies."""
    made = machine(gpu=True)
    assert made.link is not None
    link = msgspec.structs.replace(made.link, h2d=made.link.h2d.scaled(0.2), d2h=made.link.d2h.scaled(0.2))
    return msgspec.structs.replace(made, link=link)


def test_units_that_will_be_refused_are_not_foreseen_on_the_cpu(foresight: Foresight) -> None:
    room = Room(device=40 * MIB, host=600 * MIB)
    before = foresight.forecast(slow_link(), prompt=16, generated=8, room=room)
    on_cpu = {block.name for block in before.plan.on_cpu()}
    refused = next(name for name in sorted(on_cpu) if name.endswith("_proj"))
    matrix = foresight.model.get_submodule(refused)
    matrix.layer_idx = 3  # type: ignore[assignment]
    matrix.config = SimpleNamespace(_attn_implementation="flash_attention_2")  # type: ignore[assignment]
    found = foresight.forecast(slow_link(), prompt=16, generated=8, room=room)
    assert {block.name for block in found.plan.on_cpu()} == on_cpu - {refused}
    assert {number for number, rows in found.setting.on_cpu.items() if rows} == {b.id for b in found.plan.on_cpu()}
    assert any("computed by flash_attention_2, which the CPU does not have" in note for note in found.plan.notes)


def test_keys_and_values_and_copies_of_small_tensors_are_within_the_hosts_budget(foresight: Foresight) -> None:
    kv = kv_nbytes(foresight.model.config, foresight.model.dtype, context=512, batch=16)
    assert kv == 2 * 8 * 256 * 4 * 512 * 16
    weights = foresight.weights_nbytes
    for host in (weights // 2 + kv, weights + kv // 2, weights + kv, weights + 2 * kv):
        found = foresight.forecast(
            slow_link(), prompt=504, generated=8, batch=16, room=Room(device=40 * MIB, host=host)
        )
        if found.plan.on_cpu():
            assert found.plan.host_nbytes + kv <= host
    assert found.plan.on_cpu()


def test_what_goes_beyond_the_budget_is_computed_on_the_device(foresight: Foresight) -> None:
    budgets = Budgets(host=600 * MIB, device=6 * MIB, disk_rate=1e9, link_rate=1e9)
    layout = Planner(foresight.model, foresight.backing, budgets, buffers_nbytes=0, keep_skew=False).best()
    assert layout.back is not None
    asked = replace(layout, on_cpu=dict.fromkeys(layout.back.resident, 4))
    there, _ = settled(foresight.model, asked, torch.device("cuda"), host_nbytes=None)
    assert there.on_cpu
    assert there.host_nbytes > layout.host_nbytes  # the norms of its layers
    same, _ = settled(foresight.model, asked, torch.device("cuda"), host_nbytes=there.host_nbytes)
    assert same == there
    none, notes = settled(foresight.model, asked, torch.device("cuda"), host_nbytes=there.host_nbytes - 1)
    assert none.on_cpu == {}
    assert none.host_nbytes == layout.host_nbytes
    assert "take 1 bytes more of the host than its budget has" in notes[-1]


def test_a_plan_that_cuts_a_table_into_dust_is_refused(foresight: Foresight) -> None:
    budgets = Budgets(host=60 * MIB, device=None, disk_rate=1e9, link_rate=1e9)
    planner = Planner(foresight.model, foresight.backing, budgets, buffers_nbytes=0, keep_skew=True)
    plan = foresight.forecast(machine(gpu=False), prompt=16, generated=8, room=Room(host=60 * MIB)).plan
    assert planner.as_planned(plan).tables
    edited = replace(plan, tables=("lm_head.weight",), limit_nbytes=1)
    with pytest.raises(UsageError, match=r"would cut lm_head.weight, 20000 rows of 1024 bytes, into 20000 blocks"):
        planner.as_planned(edited)
    with pytest.raises(UsageError, match="give 5120 or more"):
        planner.as_planned(edited)


def bound_by_arithmetic() -> Hardware:
    """Both processors take as long for a row of the one as of the other, and twice as long for two."""
    made = machine(gpu=True)
    assert made.gpu is not None
    curves = {"float32": Curve.through([(1, 1e10), (4096, 1e10 / 4096)])}
    cpu = msgspec.structs.replace(made.cpu, linear=curves, launch_s=1e-7)
    return msgspec.structs.replace(made, cpu=cpu, gpu=msgspec.structs.replace(made.gpu, linear=curves))


def test_two_micro_batches_alternate_where_that_is_faster(layers_only: Foresight) -> None:
    """The CPU computes what it can of the one, while the device goes on with the other."""
    asked: Any = {"prompt": 16, "generated": 8, "batch": 8, "room": Room(device=18 * MIB, host=600 * MIB)}
    one, two = (layers_only.forecast(bound_by_arithmetic(), lanes=lanes, **asked) for lanes in (1, 2))
    assert (one.lanes, one.cpu_share, two.lanes, two.batch) == (1, 0.0, 2, 8)
    assert 0 < two.cpu_share <= 1
    assert two.token_s < 0.8 * one.token_s
    assert "2 micro-batches of 4 alternate between the processors" in " ".join(str(Explanation(two.plan)).split())
    assert all(turn.tokens == 8 for turn in two.prediction.turns)
    told = next(note for note in two.plan.notes if "alternate" in note)
    assert two.token_s == pytest.approx(float(told.split("about ")[1].split()[0]), rel=0.1)


def test_a_run_of_lanes_is_a_profile_like_any_other(layers_only: Foresight, tmp_path: Path) -> None:
    room = Room(device=18 * MIB, host=600 * MIB)
    found = layers_only.forecast(bound_by_arithmetic(), prompt=16, generated=8, batch=8, lanes=2, room=room)
    write_prediction(tmp_path / "run.prof", found)
    profile = read_profile(tmp_path / "run.prof")
    assert not profile.problems
    assert profile[Step].tokens.tolist() == [8] * len(found.prediction.turns)
    assert summarise(profile).bubble is not None


def test_lanes_that_would_not_gain_stay_on_one_processor(foresight: Foresight) -> None:
    """Half of the weights are read in every sweep, which takes longer than all the rest."""
    room = Room(device=8 * MIB, host=foresight.weights_nbytes // 2)
    found = foresight.forecast(bound_by_arithmetic(), prompt=16, generated=8, batch=8, lanes=2, room=room)
    assert found.binds == "disk"
    assert found.plan.on_cpu()
    assert found.cpu_share == 0.0
    assert any("share each sweep, on one processor" in note for note in found.plan.notes)


def test_keys_and_values_of_lanes_stay_within_the_hosts_budget(foresight: Foresight) -> None:
    kv = kv_nbytes(foresight.model.config, foresight.model.dtype, context=512, batch=16)
    found = foresight.forecast(
        slow_link(),
        prompt=504,
        generated=8,
        batch=16,
        lanes=2,
        room=Room(device=40 * MIB, host=foresight.weights_nbytes + kv),
    )
    keys = found.cpu_share * kv
    assert found.plan.host_nbytes + keys <= found.plan.host_budget_nbytes + kv / 8
