"""Experts beside a device apart, and those of modules that were built already: the bits of transformers' own run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_experts import ARCHITECTURES, Shelf, run
from zoo import differences, load_resident
from zoo.decoders import token_ids

import penstock
from penstock.runtime.experts.implementation import IMPLEMENTATION, REPLACED
from penstock.scheduler.experts.costs import ExpertCosts

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("every_core")]

SLOW_LINK = ExpertCosts(cpu_s=lambda rows: 1e-4 * rows, device_s=lambda rows: 1e-5, copy_s=2e-4, read_s=1e-6)
"""A copy takes as long as the CPU takes for two tokens: misses of few tokens are the CPU's."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("experts-apart"))


def limits(folder: Path) -> dict[str, tuple[int, int]]:
    """By tier: the least budget, and the weights."""
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with pytest.raises(penstock.DoesNotFitError) as caught:
        penstock.load(folder, max_memory={"device": 1, "host": 2**30}, device="emulated")
    assert caught.value.tier == "device"
    device = caught.value.needed_nbytes
    with pytest.raises(penstock.DoesNotFitError) as caught:
        penstock.load(folder, max_memory={"device": device + 2**16, "host": 1}, device="emulated")
    assert caught.value.tier == "host"
    return {"device": (device, total), "host": (caught.value.needed_nbytes, 2 * total)}


@contextmanager
def loaded(folder: Path, device: float, host: float, **options: Any) -> Iterator[Any]:
    """A model on the emulated device, with budgets between the least and all."""
    found = limits(folder)
    budgets = {
        tier: int(least + part * (most - least)) + 2**16
        for (tier, (least, most)), part in zip(found.items(), (device, host), strict=True)
    }
    model = penstock.load(folder, max_memory=budgets, device="emulated", **options)
    try:
        yield model
    finally:
        penstock.close(model)


@pytest.mark.parametrize(
    ("device", "host", "dtype"),
    [
        pytest.param(0.0, 0.0, torch.float32, id="least-fp32"),
        pytest.param(0.5, 1.0, torch.float32, id="all on the host-fp32"),
        pytest.param(0.4, 0.3, torch.bfloat16, id="some on the host-bf16"),
    ],
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_results_are_those_of_transformers_to_the_bit(
    name: str, device: float, host: float, dtype: torch.dtype, shelf: Shelf
) -> None:
    with loaded(shelf.checkpoint(name, dtype), device, host) as model:
        plan = model.penstock.plan
        assert plan.expert_passing > 0
        for _ in range(2):
            assert differences(shelf.answers(name, dtype), run(model)) == []
        counted = model.penstock.statistics().experts
        decode = counted.decode
        assert decode.uses > 0
        assert decode.copied_nbytes > 0
        assert decode.computed_by_cpu == 0
        (home,) = {block.home for block in plan.blocks[plan.first_expert :]}
        # all experts are in host memory, and stay; or some are read again and again
        assert (home == "host") is (decode.read_nbytes == 0)
        assert home == "host" or host < 1


def test_host_memory_spares_reads(shelf: Shelf) -> None:
    folder = shelf.checkpoint("qwen3-moe")
    read = []
    for host in (0.0, 0.45):
        with loaded(folder, 0.1, host) as model:
            run(model)
            counted = model.penstock.statistics().experts
            read.append(counted.decode.read_nbytes)
            assert model.penstock.plan.expert_host_slots > 0 or host == 0.0
    assert read[1] < read[0]


def test_the_cpu_computes_what_it_has_done_sooner_and_results_are_equal_to_rounding(shelf: Shelf) -> None:
    folder = shelf.checkpoint("qwen3-moe")
    expected = shelf.answers("qwen3-moe")
    for host in (0.3, 1.0):
        with loaded(folder, 0.2, host) as model:
            experts = model.penstock.machinery.session.experts
            experts.share_with_cpu(SLOW_LINK)
            inputs = {"input_ids": token_ids(seed=1, batch=1, length=9)}
            with torch.no_grad():
                found = model(**inputs).logits
                whole = load_resident(folder)(**inputs).logits
            assert torch.allclose(found, whole, rtol=1e-4, atol=1e-5)
            run(model)
            decode = model.penstock.statistics().experts.decode
            assert 0 < decode.computed_by_cpu < decode.uses
    assert expected


def test_a_plan_is_carried_out_as_it_was_made(shelf: Shelf, tmp_path: Path) -> None:
    folder = shelf.checkpoint("mixtral")
    for number, host in enumerate((0.2, 1.0)):
        with loaded(folder, 0.3, host) as model:
            first = model.penstock.plan
            penstock.save_plan(first, tmp_path / f"{number}.json")
        budgets = {"device": first.device_nbytes, "host": first.host_nbytes}
        model = penstock.load(folder, plan=tmp_path / f"{number}.json", max_memory=budgets, device="emulated")
        try:
            assert model.penstock.plan.blocks == first.blocks
            assert model.penstock.plan.expert_host_slots == first.expert_host_slots
            assert differences(shelf.answers("mixtral"), run(model)) == []
        finally:
            penstock.close(model)


def test_a_read_that_fails_is_told_and_the_next_run_is_right(shelf: Shelf, tmp_path: Path) -> None:
    folder = shelf.entry("mixtral", torch.float32).save(tmp_path / "short")
    whole = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    with loaded(folder, 0.1, 0.1) as model:
        run(model)
        for path in whole:
            with path.open("r+b") as file:
                file.truncate(4096)
        with pytest.raises(penstock.PenstockError, match="safetensors"):
            run(model)
        for path, data in whole.items():
            with path.open("r+b") as file:
                file.write(data)
        for _ in range(2):
            assert differences(shelf.answers("mixtral"), run(model)) == []


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_experts_of_a_module_that_was_built_are_blocks(name: str, device: str, shelf: Shelf, tmp_path: Path) -> None:
    folder = shelf.checkpoint(name)
    model: Any = load_resident(folder)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    weights = sum(parameter.nbytes for parameter in model.parameters())
    budgets = {"host": weights // 2} if device == "cpu" else {"device": weights // 2, "host": weights}
    penstock.offload(model, max_memory=budgets, device=device, disk=tmp_path)
    try:
        assert model.penstock.plan.expert_passing > 0
        for _ in range(2):
            assert differences(shelf.answers(name), run(model)) == []
        assert model.penstock.statistics().experts.decode.uses > 0
        found = model.state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    finally:
        penstock.close(model)


def offloaded(model: Any, disk: Path) -> Any:
    """A built module, half of whose weights are on disk."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    penstock.offload(model, max_memory={"host": weights // 2}, device="cpu", disk=disk)
    assert model.penstock.plan.expert_passing > 0
    return model


def test_gradients_reach_experts_and_no_graph_keeps_what_was_gathered(shelf: Shelf, tmp_path: Path) -> None:
    inputs = {"input_ids": token_ids(batch=2, length=9)}
    resident = load_resident(shelf.checkpoint("mixtral"))
    model = offloaded(load_resident(shelf.checkpoint("mixtral")), tmp_path)
    try:
        losses = [each.model(**inputs).last_hidden_state.square().sum() for each in (resident, model)]
        assert torch.equal(*losses)
        gathered = model.penstock.machinery.session.saved._gathered
        assert gathered
        assert all(storage.expired() for storage, *_ in gathered.values())
        for loss in losses:
            loss.backward()
        found = dict(model.named_parameters())
        for name, parameter in resident.named_parameters():
            if "experts" in name:
                assert parameter.grad is not None
                assert found[name].grad is not None
                assert torch.equal(parameter.grad, found[name].grad)
    finally:
        penstock.close(model)


def test_frozen_experts_have_the_bits_of_a_model_that_is_frozen_too(shelf: Shelf, tmp_path: Path) -> None:
    """torch multiplies the last positions of a batch otherwise where the weight wants a gradient: so do both."""
    expected = run(load_resident(shelf.checkpoint("mixtral")).requires_grad_(False))
    model = offloaded(load_resident(shelf.checkpoint("mixtral")).requires_grad_(False), tmp_path)
    try:
        assert differences(expected, run(model)) == []
        inputs = {"input_ids": token_ids(seed=2, batch=2, length=9)}
        assert differences({"2 logits": expected["2 logits"]}, {"2 logits": model(**inputs).logits}) == []
        assert model.penstock.statistics().experts.prefill.uses > 0
        assert not model.penstock.machinery.session.saved._gathered
    finally:
        penstock.close(model)


def test_the_config_says_what_it_said_once_all_models_that_share_it_are_closed(shelf: Shelf, tmp_path: Path) -> None:
    expected = shelf.answers("mixtral")
    first, second = (load_resident(shelf.checkpoint("mixtral")) for _ in range(2))
    config = first.config
    for module in second.modules():
        if "config" in vars(module):
            module.config = config
    for number, model in enumerate((first, second)):
        (tmp_path / str(number)).mkdir()
        offloaded(model, tmp_path / str(number))
    penstock.close(first)
    assert config._experts_implementation == IMPLEMENTATION
    assert differences(expected, run(second)) == []
    assert second.penstock.statistics().experts.decode.uses > 0
    penstock.close(second)
    assert config._experts_implementation == REPLACED


LINK_RESTS = ExpertCosts(cpu_s=lambda rows: 1e-6 * rows, device_s=lambda rows: 1e-7, copy_s=2e-6, read_s=1e-6)
"""Layers take long beside what moving an expert takes: there is always time for it."""


@pytest.mark.parametrize(("exact", "host"), [(True, 1.0), (False, 0.5)])
def test_the_link_brings_what_the_next_layer_needs_and_what_the_cpu_has_computed(
    exact: bool, host: float, shelf: Shelf
) -> None:
    with loaded(shelf.checkpoint("qwen3-moe"), 0.8, host) as model:
        experts = model.penstock.machinery.session.experts
        experts.look_ahead(LINK_RESTS, exact=exact)
        if not exact:
            experts.share_with_cpu(LINK_RESTS)
        expected = shelf.answers("qwen3-moe")
        for _ in range(2):
            found = run(model)
            if exact:
                assert differences(expected, found) == []
            else:
                assert torch.allclose(found["1 logits"], expected["1 logits"], rtol=1e-4, atol=1e-5)
        counted = model.penstock.statistics().experts
        assert counted.prefetching.asked > 0
        if exact:
            assert counted.decode.hits["prefetched"] == counted.prefetching.used > 0
        else:
            assert counted.decode.hits["filled"] > 0
