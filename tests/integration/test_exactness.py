"""Offloading never changes the answer, never exceeds its budget, and does move bytes."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import memory_probe
import pytest
import torch
from torch import nn
from zoo import ZOO, Outputs, differences, load_resident, used_outside
from zoo.budgets import DEVICES, LEVELS, PLENTY, find_limits, streamed

import penstock

PRETRAINED = [name for name, entry in ZOO.items() if entry.pretrained]
SWEEPS_BEFORE_STEADY = 2
MIB = 2**20

# torch's nested tensors and transformers' loaders warn about themselves; both are beside the point here.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("every_core")]


class Shelf:
    """Checkpoints and resident answers, made once per model."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._answers: dict[tuple[str, str], Outputs] = {}

    def checkpoint(self, name: str) -> Path:
        folder = self._root / name
        return folder if folder.exists() else ZOO[name].save(folder)

    def large_checkpoint(self, name: str) -> Path:
        folder = self._root / f"large-{name}"
        return folder if folder.exists() else memory_probe.save(name, folder)

    def loaded(self, name: str) -> Outputs:
        """What transformers' own load of the checkpoint answers."""
        key = (name, "loaded")
        if key not in self._answers:
            self._answers[key] = ZOO[name].run(load_resident(self.checkpoint(name)))
        return self._answers[key]

    def built(self, name: str) -> Outputs:
        """What the freshly built module answers."""
        key = (name, "built")
        if key not in self._answers:
            self._answers[key] = ZOO[name].run(ZOO[name].build())
        return self._answers[key]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("checkpoints"))


def place_loaded(folder: Path, budget: dict[str, int], device: str) -> Any:
    return penstock.load(folder, max_memory=budget, device=device)


def place_offloaded(name: str, budget: dict[str, int], device: str) -> Any:
    return penstock.offload(ZOO[name].build(), max_memory=budget, device=device)


def settled_read(model: Any) -> int:
    """Bytes of blocks read so far, once prefetching has gone as far ahead as its slots let it."""
    last, since, deadline = -1, time.monotonic(), time.monotonic() + 10
    while time.monotonic() < deadline:
        totals = model.penstock.statistics()
        now = totals.disk_read_nbytes - totals.rows_read_nbytes
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > 0.06:
            return int(now)
        time.sleep(0.01)
    raise AssertionError("the disk was still being read ten seconds after the last sweep")


def check_streams(name: str, model: Any, expected: Outputs, level: str) -> None:
    """Right twice, the second time in the learned order, and reading what the plan says."""
    entry = ZOO[name]
    plan = model.penstock.plan
    assert not plan.resident
    moves = plan.disk_nbytes_per_sweep + plan.link_nbytes_per_sweep
    assert moves > 0 or plan.tables  # with all blocks kept, only lookups are left
    for attempt in ("first", "second"):
        assert differences(expected, entry.run(model)) == [], attempt
    totals = model.penstock.statistics()
    assert totals.disk_read_nbytes + totals.h2d_nbytes > 0 or not moves
    follows_plan = entry.fixed_order and not plan.expert_passing  # which experts are read depends on the routing
    if follows_plan and level in ("nothing", "half"):
        for _ in range(SWEEPS_BEFORE_STEADY):
            entry.sweep(model)
        before = settled_read(model)
        entry.sweep(model)
        # the ring may still hold a block from the sweep before when its turn comes again
        ring = (plan.slots + plan.host_slots) * max(block.slot_nbytes for block in plan.blocks)
        read = settled_read(model) - before
        assert plan.disk_nbytes_per_sweep - ring <= read <= plan.disk_nbytes_per_sweep


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PRETRAINED)
def test_loaded_model_is_bit_equal(name: str, device: str, level: str, shelf: Shelf) -> None:
    expected = shelf.loaded(name)
    with streamed(partial(place_loaded, shelf.checkpoint(name)), device=device, level=level) as model:
        check_streams(name, model, expected, level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ZOO)
def test_offloaded_module_is_bit_equal(name: str, device: str, level: str, shelf: Shelf) -> None:
    expected = shelf.built(name)
    with streamed(partial(place_offloaded, name), device=device, level=level) as model:
        check_streams(name, model, expected, level)


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_dtype_is_converted_on_the_way(name: str, shelf: Shelf) -> None:
    folder = shelf.checkpoint(name)
    expected = ZOO[name].run(load_resident(folder, dtype=torch.bfloat16))

    def place(budget: dict[str, int], device: str) -> Any:
        return penstock.load(folder, max_memory=budget, device=device, dtype="bfloat16")

    with streamed(place, level="half") as model:
        assert differences(expected, ZOO[name].run(model)) == []
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("skew", [0, 8, 16, 32])
def test_offload_keeps_where_weights_lie_modulo_64(skew: int, requires_grad: bool) -> None:
    """Matrix kernels choose by address and by requires_grad, and round differently: both have to survive."""

    def build() -> nn.Module:
        model = ZOO["gpt2"].build().requires_grad_(requires_grad)
        for parameter in model.parameters():
            parameter.data = _lie_at(parameter.data, skew)
        return model

    def place(budget: dict[str, int], device: str) -> Any:
        return penstock.offload(build(), max_memory=budget, device=device)

    expected = ZOO["gpt2"].run(build())
    with streamed(place) as model:
        assert differences(expected, ZOO["gpt2"].run(model)) == []
        assert all(parameter.requires_grad == requires_grad for parameter in model.parameters())


def _lie_at(tensor: torch.Tensor, skew: int) -> torch.Tensor:
    """A copy of `tensor` that starts `skew` bytes past a multiple of 64."""
    room = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + skew
    copy = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "t5", "mamba"])
def test_model_that_fits_runs_without_hooks(name: str, device: str, shelf: Shelf) -> None:
    folder = shelf.checkpoint(name)
    place = partial(place_loaded, folder)
    budget = {"host": PLENTY} if device == "cpu" else {"device": PLENTY, "host": PLENTY}
    tier = "host" if device == "cpu" else "device"
    others = {key: value for key, value in budget.items() if key != tier}
    budget[tier] = find_limits(place, device, tier, others).resident
    model = place(budget, DEVICES[device])
    try:
        assert model.penstock.plan.resident
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        assert differences(shelf.loaded(name), ZOO[name].run(model)) == []
    finally:
        penstock.close(model)


@pytest.mark.parametrize("name", ["wanderer", "echo", "siblings", "borrower"])
def test_another_order_is_relearned_and_stays_right(name: str, shelf: Shelf) -> None:
    with streamed(partial(place_offloaded, name), level="half") as model:
        for _ in range(3):
            assert differences(shelf.built(name), ZOO[name].run(model)) == []
        if name == "wanderer":
            assert model.penstock.statistics().relearned > 0


def test_refused_offload_leaves_the_module_alone(shelf: Shelf) -> None:
    model = ZOO["gpt2"].build()
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(penstock.DoesNotFitError):
        penstock.offload(model, max_memory={"host": 1}, device="cpu")
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert not hasattr(model, "penstock")
    assert differences(shelf.built("gpt2"), ZOO["gpt2"].run(model)) == []


@pytest.mark.parametrize(("name", "seen"), [("mamba", True), ("fast-path", True), ("hoarder", True), ("llama", False)])
def test_zoo_has_weights_used_outside_their_owners_forward(name: str, seen: bool) -> None:
    """The tests above mean more because of these; should torch or transformers change, somebody should hear of it."""
    assert bool(used_outside(ZOO[name])) == seen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["load", "offload"])
@pytest.mark.parametrize("name", memory_probe.LARGE)
def test_memory_stays_within_the_budget(name: str, way: str, device: str, shelf: Shelf) -> None:
    folder = shelf.large_checkpoint(name)
    budget = memory_probe.weight_nbytes(folder) // 4
    tiers = {"host": budget} if device == "cpu" else {"device": budget // 2, "host": budget // 2}
    measured = memory_probe.measure(folder, way=way, device=DEVICES[device], budget=tiers)
    assert measured.exact
    assert measured.disk_read_nbytes > memory_probe.weight_nbytes(folder) // 2
    assert measured.peak_nbytes - measured.baseline_nbytes <= sum(tiers.values()) + 48 * MIB
