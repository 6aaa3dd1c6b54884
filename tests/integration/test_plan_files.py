"""Plans that are saved, edited and carried out; and what a calibration decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import ZOO, token_ids
from zoo.budgets import DEVICES, PLENTY, find_budget

import penstock
from penstock.api import link_cache
from penstock.arguments import wanted_of
from penstock.devices import open_device
from penstock.memory.errors import DoesNotFitError, UsageError
from penstock.runtime import loading
from penstock.runtime.deciding import Decisions
from penstock.scheduler.cost import CostModel
from penstock.scheduler.curves import Curve
from penstock.scheduler.hardware import Drive, Hardware, Link, Processor
from penstock.scheduler.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ZOO["llama"].save(tmp_path_factory.mktemp("zoo"))


def half(folder: Path, kind: str) -> dict[str, int]:
    def place(budget: dict[str, int], device: str) -> Any:
        return penstock.load(folder, max_memory=budget, device=device)

    return find_budget(place, kind, "half")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits.clone()


@pytest.fixture(params=["cpu", "emulated"])
def saved(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> tuple[Path, str, torch.Tensor, Plan]:
    kind = request.param
    model = penstock.load(folder, max_memory=half(folder, kind), device=DEVICES[kind])
    found = logits(model)
    plan = model.penstock.plan
    penstock.close(model)
    path = tmp_path / "plan.json"
    penstock.save_plan(plan, path)
    return path, DEVICES[kind], found, plan


def test_a_saved_plan_is_carried_out_as_it_is(saved: tuple[Path, str, torch.Tensor, Plan], folder: Path) -> None:
    path, device, expected, plan = saved
    model = penstock.load(folder, device=device, plan=path)
    again = model.penstock.plan
    assert (again.blocks, again.slots, again.slot_nbytes) == (plan.blocks, plan.slots, plan.slot_nbytes)
    assert (again.host_slots, again.host_slot_nbytes) == (plan.host_slots, plan.host_slot_nbytes)
    assert torch.equal(logits(model), expected)
    penstock.close(model)


def edited(path: Path, change: Any) -> None:
    document = json.loads(path.read_text())
    change(document["plan"])
    path.write_text(json.dumps(document))


def test_homes_that_were_edited_hold(saved: tuple[Path, str, torch.Tensor, Plan], folder: Path) -> None:
    path, device, expected, plan = saved
    first = "device" if plan.device_budget_nbytes is not None else "host"
    moved = next(block.id for block in plan.blocks if block.home == first and block.id)

    def away(document: dict[str, Any]) -> None:
        document["blocks"][moved]["home"] = "disk"

    small = plan.blocks[moved].slot_nbytes <= plan.slot_nbytes
    edited(path, away)
    if not small:
        with pytest.raises(UsageError, match="of a slot"):
            penstock.load(folder, device=device, plan=path)
        return
    model = penstock.load(folder, device=device, plan=path)
    assert model.penstock.plan.blocks[moved].home == "disk"
    assert model.penstock.plan.disk_nbytes_per_sweep > plan.disk_nbytes_per_sweep
    assert torch.equal(logits(model), expected)
    penstock.close(model)


def test_plans_that_cannot_be_carried_out_are_refused(
    saved: tuple[Path, str, torch.Tensor, Plan], folder: Path, tmp_path: Path
) -> None:
    path, device, _, plan = saved
    separate = plan.device_budget_nbytes is not None
    other = "cpu" if separate else DEVICES["emulated"]
    with pytest.raises(UsageError, match="the plan is for a machine"):
        penstock.load(folder, device=other, max_memory={"host": PLENTY} | ({} if separate else {"device": PLENTY}),
                      plan=path)  # fmt: skip
    elsewhere = ZOO["gpt2"].save(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="another model"):
        penstock.load(elsewhere, device=device, plan=path)
    with pytest.raises(DoesNotFitError, match="the plan takes"):
        penstock.load(folder, device=device, plan=path, max_memory={"host": plan.host_nbytes - 1})
    edited(path, lambda document: document["blocks"][0].update(home="disk"))
    with pytest.raises(UsageError, match="small tensors"):
        penstock.load(folder, device=device, plan=path)
    edited(path, lambda document: document.update(slots=1) or document["blocks"][0].update(home=plan.blocks[0].home))
    with pytest.raises(UsageError, match="has 1 slots"):
        penstock.load(folder, device=device, plan=path)


def test_a_plan_that_lets_the_cpu_compute_is_no_exact_one(folder: Path, tmp_path: Path) -> None:
    device = DEVICES["emulated"]
    model = penstock.load(
        folder, max_memory={"device": half(folder, "emulated")["device"], "host": PLENTY}, device=device
    )
    expected, plan = logits(model), model.penstock.plan
    penstock.close(model)
    path = tmp_path / "plan.json"
    penstock.save_plan(plan, path)
    kept = [block.id for block in plan.blocks if block.home == "host"]
    assert kept

    def on_cpu(document: dict[str, Any]) -> None:
        for block in kept:
            document["blocks"][block].update(cpu_rows_below=100, processor="cpu")

    edited(path, on_cpu)
    with pytest.raises(UsageError, match="exact=True forbids"):
        penstock.load(folder, device=device, plan=path, exact=True)
    model = penstock.load(folder, device=device, plan=path)
    assert model.penstock.plan.on_cpu()
    assert torch.equal(logits(model), expected)  # on an emulated device both processors are the CPU
    penstock.close(model)


def machine(*, link: float, cpu: float) -> Hardware:
    """A device that computes at once, over a link and beside a CPU of these rates in bytes per second."""

    def processor(name: str, rate: float) -> Processor:
        return Processor(
            name=name, memory_nbytes=2**40, memory=Curve.flat(1e12), linear={"float32": Curve.flat(rate)},
            attention={"float32": Curve.flat(rate)}, cores=2,
        )  # fmt: skip

    return Hardware(
        name="made up",
        cpu=processor("cpu", cpu),
        gpu=processor("gpu", 1e12),
        link=Link(h2d=Curve.flat(link), d2h=Curve.flat(link), latency_s=1e-6),
        host_nbytes=2**40,
        drives=(Drive(name="disk", read=Curve.flat(1e8), write=Curve.flat(1e8)),),
        emulated=True,
    )


@pytest.mark.parametrize(
    ("link", "cpu", "exact", "expected"),
    [(1e8, 1e10, False, "cpu"), (1e10, 1e8, False, "device"), (1e8, 1e10, True, "device")],
)
def test_a_calibration_decides_who_computes(folder: Path, link: float, cpu: float, exact: bool, expected: str) -> None:
    budget = {"device": half(folder, "emulated")["device"], "host": PLENTY}
    plain = penstock.load(folder, max_memory=budget, device=DEVICES["emulated"])
    before = logits(plain)
    penstock.close(plain)
    model = loading.load(
        folder,
        wanted=wanted_of(budget),
        device=open_device(DEVICES["emulated"]),
        dtype="auto",
        disk=[],
        context=None,
        batch=None,
        trust_remote_code=False,
        cache=link_cache(),
        decisions=Decisions(costs=CostModel(hardware=machine(link=link, cpu=cpu)), rows=1, exact=exact),
    )
    plan = model.penstock.plan
    kept = [block for block in plan.blocks if block.home == "host"]
    assert kept
    assert plan.blocks_at("disk") == 0  # there is room for all of it, and the disk is slow
    assert any(block.processor == "cpu" for block in kept) is (expected == "cpu")
    assert any("one processor" in note for note in plan.notes) is (expected == "cpu" or exact)
    assert torch.equal(logits(model), before)
    penstock.close(model)
