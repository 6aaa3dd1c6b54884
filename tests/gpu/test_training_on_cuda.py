"""Training on CUDA against plain PyTorch on CUDA: the same bits, whichever processor updates, whoever races with whom.

The resident model is on the device. Its masters are where the update is made, for the last bit of an update may depend
on the processor: in host memory, updated by torch's AdamW on the CPU, or on the device, by torch's AdamW there, one
tensor after the other. Norms of one backward pass are taken on the device; those of sums on the CPU, as the sums are.

The functions know the device by name, so that their logic can be tried on an emulated one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from zoo.budgets import PLENTY

import penstock
from penstock.memory.errors import DoesNotFitError
from penstock.runtime.training import room, selection

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

DEVICE = "cuda"
STEPS, RATE = 5, 1e-2
BUSY = 2_000_000
"""Clock cycles in backward before a gradient is made: about a millisecond, in which a wrong copy would overtake it."""


@pytest.fixture(autouse=True)
def short_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small model has many."""
    for user in (room, selection):
        monkeypatch.setattr(user, "ELEMENTS", 4096)


def place() -> torch.device:
    """Where torch computes."""
    return torch.device("cuda" if DEVICE.startswith("cuda") else "cpu")


def sleep() -> None:
    """Keep the device busy."""
    if place().type == "cuda":
        torch.cuda._sleep(BUSY)


def make(dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4
    )
    return LlamaForCausalLM(config).to(dtype)


def ids(number: int) -> Tensor:
    made = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(number))
    return made.to(place())


def loss_of(model: Any, number: int) -> Tensor:
    found: Tensor = model(input_ids=ids(number), labels=ids(number), use_cache=False).loss
    return found


class Resident:
    """Plain PyTorch, as the module's docstring says."""

    def __init__(self, model: Any, *, where: str, clip: float | None) -> None:
        self.model = model.to(place())
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        home = torch.device("cpu") if where == "cpu" else place()
        self.masters = [p.detach().to(home, torch.float32, copy=True).requires_grad_() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=RATE, foreach=False)
        self.clip = clip

    def step(self, losses: Sequence[Tensor]) -> Tensor:
        """One step of so many backward passes; the norm of all gradients."""
        sums: list[Tensor | None] = [None] * len(self.parameters)
        for number, loss in enumerate(losses):
            loss.backward()
            for index, parameter in enumerate(self.parameters):
                if parameter.grad is not None:
                    grad, parameter.grad = parameter.grad.float(), None
                    grad = grad.cpu() if len(losses) > 1 else grad
                    before = sums[index]
                    sums[index] = grad if before is None else before + grad
            assert number < len(losses)
        grads = [each for each in sums if each is not None]
        norm = torch.nn.utils.get_total_norm(grads).cpu()
        for master, grad in zip(self.masters, sums, strict=True):
            if grad is not None:
                master.grad = grad.to(master.device, copy=True)
        if self.clip is not None:
            coefficient = torch.clamp(self.clip / (norm + 1e-6), max=1.0)
            for master in self.masters:
                if master.grad is not None:
                    master.grad.mul_(coefficient.to(master.device))
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.copy_(master)
        return norm


@contextmanager
def prepared(model: Any, folder: Path, budget: str, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A model in training, on a device that holds nothing, or all of it, beside least, or plenty of, host memory."""
    clip = options.pop("clip", None)

    def ask(memory: dict[str, int]) -> Any:
        choice = penstock.AdamW(lr=RATE, max_grad_norm=clip)
        return penstock.prepare(model, optimizer=choice, disk=folder, max_memory=memory, device=DEVICE, **options)

    memory = {"device": PLENTY, "host": PLENTY}
    if budget != "all":
        for tier in ("device", "host") if budget == "least" else ("device",):
            with pytest.raises(DoesNotFitError) as caught:
                ask({**memory, tier: 1})
            memory[tier] = caught.value.needed_nbytes
    made = ask(memory)
    try:
        yield made
    finally:
        penstock.close(made[0])


def check_same(model: Any, expected: nn.Module) -> None:
    """Weights have the same bits."""
    found = model.state_dict()
    different = [
        name for name, value in expected.state_dict().items() if not torch.equal(value.cpu(), found[name].cpu())
    ]
    assert different == []


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("budget", ["least", "streams", "all"])
def test_the_bits_of_the_resident_run(tmp_path: Path, budget: str, where: str, clip: float | None) -> None:
    resident = Resident(make(), where=where, clip=clip)
    with prepared(make(), tmp_path / "run", budget, update_on=where, clip=clip) as (model, optimizer):
        for step in range(STEPS):
            expected, found = loss_of(resident.model, step), loss_of(model, step)
            assert torch.equal(expected, found), step
            found.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(resident.step([expected]), optimizer.training.gradient_norm), step
        check_same(model, resident.model)


@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("budget", ["least", "streams", "all"])
def test_updates_that_begin_in_backward(tmp_path: Path, budget: str, where: str) -> None:
    resident = Resident(make(), where=where, clip=None)
    with prepared(make(), tmp_path / "run", budget, update_on=where, updates="backward") as (model, optimizer):
        for step in range(STEPS):
            expected, found = loss_of(resident.model, step), loss_of(model, step)
            assert torch.equal(expected, found), step
            found.backward()
            optimizer.step()
            optimizer.zero_grad()
            resident.step([expected])
        check_same(model, resident.model)


@pytest.mark.parametrize("updates", ["step", "backward"])
@pytest.mark.parametrize("budget", ["least", "all"])
def test_sums_of_several_passes(tmp_path: Path, budget: str, updates: str) -> None:
    resident = Resident(make(), where="cpu", clip=None)
    with prepared(make(), tmp_path / "run", budget, updates=updates, accumulate=3) as (model, optimizer):
        for step in range(STEPS):
            expected = [loss_of(resident.model, 3 * step + number) for number in range(3)]
            for number in range(3):
                found = loss_of(model, 3 * step + number)
                assert torch.equal(expected[number], found)
                found.backward()
            optimizer.step()
            optimizer.zero_grad()
            resident.step(expected)
        check_same(model, resident.model)


class Slow(nn.Module):
    """Layers whose gradients are made late, one after the other, in memory that the next ones want."""

    def __init__(self, width: int = 256, layers: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
            if x.requires_grad:
                x.register_hook(_late)
        return x


def _late(grad: Tensor) -> Tensor:
    sleep()
    return grad


def make_slow() -> Slow:
    torch.manual_seed(3)
    return Slow()


@pytest.mark.parametrize("updates", ["step", "backward"])
@pytest.mark.parametrize("where", ["cpu", "device"])
def test_copies_never_overtake_gradients_nor_gradients_copies(tmp_path: Path, where: str, updates: str) -> None:
    """What a step has made is not looked at before the next one has been launched."""
    resident = Resident(make_slow(), where=where, clip=None)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(1)).to(place())
    for _ in range(STEPS):
        resident.step([resident.model(x).square().mean()])
    with prepared(make_slow(), tmp_path / "run", "streams", update_on=where, updates=updates) as (model, optimizer):
        optimizer.training.gradients.intake._departures._held_nbytes = 1 << 18  # so that memory is used again at once
        for _ in range(STEPS):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        check_same(model, resident.model)


def test_backward_never_synchronises(tmp_path: Path) -> None:
    if place().type != "cuda":
        pytest.skip("there is nothing to synchronise with on an emulated device")
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(1)).to(place())
    with prepared(make_slow(), tmp_path / "run", "streams") as (model, optimizer):
        for step in range(4):
            loss = model(x).square().mean()
            if step == 3:
                torch.cuda.set_sync_debug_mode("error")
            try:
                loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            optimizer.step()
            optimizer.zero_grad()


def test_host_memory_of_training_is_pinned_and_given_back(tmp_path: Path) -> None:
    with prepared(make(), tmp_path / "run", "all", update_on="device") as (model, optimizer):
        training = optimizer.training
        arenas = [*training._pipeline.arenas, training._pipeline._arena, training.gradients.intake.room.arena]
        if place().type == "cuda":
            assert all(arena.registered for arena in arenas)
        loss_of(model, 0).backward()
        optimizer.step()
    assert not any(getattr(arena, "registered", False) for arena in arenas)


def test_a_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    resident = Resident(make(), where="device", clip=0.5)
    with prepared(make(), tmp_path / "run", "streams", update_on="device", clip=0.5) as (model, optimizer):
        for step in range(2):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        memory = {"device": model.penstock.plan.device_budget_nbytes, "host": PLENTY}
        penstock.save(model, optimizer).wait()
    model, optimizer = penstock.resume(
        tmp_path / "run", model=make(), max_memory=memory, device=DEVICE, update_on="device"
    )
    try:
        for step in range(2, STEPS):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        for step in range(STEPS):
            resident.step([loss_of(resident.model, step)])
        check_same(model, resident.model)
    finally:
        penstock.close(model)
