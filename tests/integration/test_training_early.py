"""Updates that begin in backward: the same bits, and what cannot be taken back is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import penstock
from penstock.memory.errors import DoesNotFitError, UsageError

STEPS = 6


def make(dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4
    )
    return LlamaForCausalLM(config).to(dtype)


def ids(number: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(number))


def reference(passes: int, dtype: torch.dtype) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = make(dtype)
    parameters = list(model.parameters())
    masters = [parameter.detach().float().requires_grad_() for parameter in parameters]
    optimizer = torch.optim.AdamW(masters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    losses = []
    for step in range(STEPS):
        sums = [torch.zeros_like(master) for master in masters]
        for number in range(passes):
            batch = ids(step * passes + number)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            losses.append(loss.item())
            for total, parameter in zip(sums, parameters, strict=True):
                assert parameter.grad is not None
                total += parameter.grad.float()
                parameter.grad = None
        for master, total in zip(masters, sums, strict=True):
            master.grad = total
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)
    return losses, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@contextmanager
def prepared(folder: Path, budget: str, model: Any = None, **options: Any) -> Iterator[tuple[Any, Any]]:
    choice = penstock.AdamW(lr=1e-2)
    options = {"device": "cpu", "updates": "backward", **options}
    made = None
    if budget == "smallest":
        with pytest.raises(DoesNotFitError) as refused:
            penstock.prepare(make(), optimizer=choice, disk=folder, max_memory={"host": 1 << 20}, **options)
        budget = str(refused.value.needed_nbytes)
        made = penstock.prepare(
            model or make(), optimizer=choice, disk=folder, max_memory={"host": int(budget)}, **options
        )
    else:
        made = penstock.prepare(model or make(), optimizer=choice, disk=folder, max_memory={"host": budget}, **options)
    try:
        yield made
    finally:
        penstock.close(made[0])


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("budget", ["smallest", "1GiB"])
def test_updates_in_backward_have_the_bits_of_those_at_the_end(
    tmp_path: Path, budget: str, passes: int, dtype: torch.dtype, activations: str
) -> None:
    losses, weights = reference(passes, dtype)
    found = []
    if budget == "smallest" and dtype == torch.float32:
        budget = "64MiB"
    with prepared(tmp_path / "run", budget, make(dtype), accumulate=passes, activations=activations) as (
        model,
        optimizer,
    ):
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for step in range(STEPS):
            for number in range(passes):
                batch = ids(step * passes + number)
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
                loss.backward()
                found.append(loss.item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        assert found == losses
        state = model.state_dict()
        assert [name for name, value in weights.items() if not torch.equal(state[name], value)] == []
        with model.penstock.gathered(model.model.layers[1]) as layer:
            assert torch.equal(layer.mlp.up_proj.weight, weights["model.layers.1.mlp.up_proj.weight"])


def backward(model: Any, number: int = 0) -> None:
    model(input_ids=ids(number), labels=ids(number), use_cache=False).loss.backward()


def test_fewer_backward_passes_than_said_are_not_lost(tmp_path: Path) -> None:
    losses, weights = reference(1, torch.bfloat16)
    found = []
    with prepared(tmp_path / "run", "1GiB", accumulate=3) as (model, optimizer):
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for step in range(STEPS):
            loss = model(input_ids=ids(step), labels=ids(step), use_cache=False).loss
            loss.backward()
            found.append(loss.item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        state = model.state_dict()
    assert found == losses
    assert [name for name, value in weights.items() if not torch.equal(state[name], value)] == []


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_a_graph_from_before_a_step_is_refused(tmp_path: Path, activations: str) -> None:
    with prepared(tmp_path / "run", "smallest", updates="step", activations=activations) as (model, optimizer):
        old = model(input_ids=ids(1), labels=ids(1), use_cache=False).loss
        backward(model)
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"before optimizer\.step"):
            old.backward()


def test_nothing_is_saved_between_two_steps(tmp_path: Path) -> None:
    with prepared(tmp_path / "run", "1GiB") as (model, optimizer):
        backward(model)
        with pytest.raises(UsageError, match="after step"):
            penstock.save(model, optimizer)


def test_a_module_keeps_its_weights_where_a_run_is_in_the_way(tmp_path: Path) -> None:
    with prepared(tmp_path / "run", "1GiB") as (model, optimizer):
        penstock.save(model, optimizer).wait()
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(penstock.PenstockError, match="resume"):
        penstock.prepare(module, optimizer=penstock.AdamW(), disk=tmp_path / "run", device="cpu")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_what_cannot_be_taken_back_is_refused(tmp_path: Path) -> None:
    with prepared(tmp_path / "run", "1GiB") as (model, optimizer):
        backward(model)
        with pytest.raises(UsageError, match="zero_grad"):
            optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 1.0
        with pytest.raises(UsageError, match="changed between backward and step"):
            optimizer.step()
    with prepared(tmp_path / "other", "1GiB") as (model, optimizer):
        backward(model)
        with pytest.raises(UsageError, match="accumulate"):
            backward(model, 1)


@pytest.mark.parametrize("other", [{"nonfinite": "skip"}, {"optimizer": penstock.AdamW(max_grad_norm=1.0)}])
def test_what_needs_all_gradients_first_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    options = {"optimizer": penstock.AdamW(), **other}
    with pytest.raises(UsageError, match="needs all of them first"):
        penstock.prepare(make(), disk=tmp_path / "run", updates="backward", device="cpu", **options)


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with prepared(tmp_path / "run", "1GiB") as (model, _):
        loss = model(input_ids=ids(0), labels=ids(0), use_cache=False).loss
        with pytest.raises(penstock.PenstockError, match="not finite"):
            (loss * float("inf")).backward()
