"""Training on a device apart: gradients leave while backward goes on, updates are made on either processor, and the
bits are those of the resident run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_early import STEPS, backward, ids, make, reference
from training_reference import EMULATED, PLENTY, smallest

import penstock
from penstock import trainedmodel
from penstock.runtime.training import departures as departing
from penstock.runtime.training import deviceupdates, room, selection
from penstock.runtime.training.early import NonFiniteGradientError
from penstock.scheduler.updating import UpdateShares


@pytest.fixture(autouse=True)
def short_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small model has many."""
    for user in (room, selection):
        monkeypatch.setattr(user, "ELEMENTS", 4096)


pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def prepared(folder: Path, host: str, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A model on a device as small as can be, beside as little host memory, or as much as is of any use."""
    dtype = options.pop("dtype", torch.bfloat16)

    def place(memory: dict[str, int], device: str) -> Any:
        choice = penstock.AdamW(lr=1e-2)
        return penstock.prepare(make(dtype), optimizer=choice, disk=folder, max_memory=memory, device=device, **options)

    device, memory = smallest(place, "emulated")
    if host == "plenty":
        memory["host"] = PLENTY
    made = place(memory, device)
    try:
        yield made
    finally:
        penstock.close(made[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("updates", ["step", "backward"])
@pytest.mark.parametrize(("host", "where"), [("smallest", "cpu"), ("smallest", "device"), ("plenty", "half")])
def test_the_bits_of_the_resident_run(
    tmp_path: Path, host: str, where: str, updates: str, passes: int, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if where == "half":
        half = UpdateShares(in_memory=0.5, on_disk=0.5, why="half of it")
        monkeypatch.setattr(trainedmodel, "update_shares", lambda *_, **__: half)
        where = "auto"
    usual = departing.Departures.__init__.__kwdefaults__
    monkeypatch.setattr(departing.Departures.__init__, "__kwdefaults__", {**usual, "held_nbytes": 1 << 14})  # all wait
    losses, weights = reference(passes, dtype)
    found = []
    options = {"dtype": dtype, "updates": updates, "accumulate": passes, "update_on": where}
    with prepared(tmp_path / "run", host, **options) as (model, optimizer):
        assert model.penstock.plan.device == "emulated"
        there, every = len(optimizer.training._updater._changes.on_device), len(optimizer.training._shards)
        assert (there == 0) == (where == "cpu")
        assert where != "auto" or there < every - 1
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


@pytest.mark.parametrize("updates", ["step", "backward"])
@pytest.mark.parametrize("host", ["smallest", "plenty"])
def test_a_commit_has_all_of_its_step_and_none_of_the_next(tmp_path: Path, host: str, updates: str) -> None:
    """Nobody waits for one; the device updates, and the next step begins."""
    losses, weights = reference(1, torch.bfloat16)
    options: dict[str, Any] = {"updates": updates, "update_on": "device"}

    def schedule_of(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    def step_on(model: Any, optimizer: Any, schedule: Any, number: int) -> None:
        loss = model(input_ids=ids(number), labels=ids(number), use_cache=False).loss
        assert loss.item() == losses[number]
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    with prepared(tmp_path / "run", host, **options) as (model, optimizer):
        plan, schedule = model.penstock.plan, schedule_of(optimizer)
        for number in range(5):
            step_on(model, optimizer, schedule, number)
            if number < 3:
                commit = penstock.save(model, optimizer, scheduler=schedule)
        commit.wait()
    memory = {"device": plan.device_budget_nbytes, "host": plan.host_budget_nbytes}
    model, optimizer = penstock.resume(
        tmp_path / "run", model=make(), max_memory=memory, device="emulated", scheduler=schedule_of, **options
    )
    try:
        for number in range(3, STEPS):
            step_on(model, optimizer, optimizer.scheduler, number)
        state = model.state_dict()
        assert [name for name, value in weights.items() if not torch.equal(state[name], value)] == []
    finally:
        penstock.close(model)


def test_where_little_memory_is_left_a_few_blocks_have_places(tmp_path: Path) -> None:
    with prepared(tmp_path / "run", "smallest", updates="backward") as (_, optimizer):
        assert optimizer.training.gradients.intake.pool is not None
        assert optimizer.training._behind == 3
    with prepared(tmp_path / "other", "plenty", updates="backward") as (_, optimizer):
        assert optimizer.training.gradients.intake.pool is None
        assert optimizer.training._behind > len(optimizer.training.trained)


@pytest.mark.parametrize("host", ["smallest", "plenty"])
def test_blocks_that_are_never_whole_do_not_stop_backward(tmp_path: Path, host: str) -> None:
    """Each block misses a gradient, so that none is updated before `step()`, and all wait."""
    with prepared(tmp_path / "run", host, updates="backward") as (model, optimizer):
        frozen = [layer.self_attn.q_proj.weight for layer in model.model.layers]
        for weight in frozen:
            weight.requires_grad_(False)
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.training.finish()
        assert sum(count == 0 for count in optimizer.training.counts) == len(frozen)


def test_a_gradient_that_is_not_finite_ends_an_early_step(tmp_path: Path) -> None:
    with prepared(tmp_path / "run", "plenty", updates="backward") as (model, optimizer):
        batch = ids(0)
        (model(input_ids=batch, labels=batch, use_cache=False).loss * float("inf")).backward()
        with pytest.raises(NonFiniteGradientError, match="last commit"):
            optimizer.step()
        with pytest.raises(NonFiniteGradientError):
            optimizer.step()


def test_the_norm_is_there_after_an_early_step(tmp_path: Path) -> None:
    plain = make()
    plain(input_ids=ids(0), labels=ids(0)).loss.backward()
    wide = [parameter.grad.float() for parameter in plain.parameters() if parameter.grad is not None]
    with prepared(tmp_path / "run", "plenty", updates="backward") as (model, optimizer):
        backward(model)
        optimizer.step()
        assert torch.equal(optimizer.training.gradient_norm, torch.nn.utils.get_total_norm(wide))


def test_homes_of_blocks_on_the_device_are_in_host_memory_where_there_is_room(tmp_path: Path) -> None:
    """Then no step moves anything over the drive, all weights being on the device and all states in memory."""
    with prepared_on(tmp_path / "run", PLENTY) as (model, optimizer):
        plan = model.penstock.plan
        assert {block.home for block in plan.blocks} == {"device"}
        assert plan.host_slots == 0
        before = 0, 0
        for step in range(3):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            optimizer.training.finish()
            found = model.penstock.statistics()
            moved = found.disk_read_nbytes, found.disk_written_nbytes
            assert step == 0 or moved == before
            before = moved
        assert "are in host memory too, where they change" in str(penstock.explain(model))


@contextmanager
def prepared_on(folder: Path, host: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """With a device that holds all weights."""
    memory = {"device": PLENTY, "host": host}
    made = penstock.prepare(
        make(), optimizer=penstock.AdamW(lr=1e-2), disk=folder, max_memory=memory, device=EMULATED, **options
    )
    try:
        yield made
    finally:
        penstock.close(made[0])


@pytest.mark.parametrize("part", [0.0, 0.4, 0.8])
def test_some_homes_are_on_disk(tmp_path: Path, part: float) -> None:
    losses, weights = reference(1, torch.bfloat16)
    with pytest.raises(penstock.DoesNotFitError) as caught, prepared_on(tmp_path / "asked", 1):
        pass
    least = caught.value.needed_nbytes
    nbytes = sum(parameter.nbytes for parameter in make().parameters())
    found = []
    with prepared_on(tmp_path / "run", least + int(part * nbytes)) as (model, optimizer):
        homes = model.penstock._machinery.back.permanent
        assert len(homes) < len(model.penstock.plan.blocks)
        assert bool(homes) == (part > 0)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for step in range(STEPS):
            loss = model(input_ids=ids(step), labels=ids(step), use_cache=False).loss
            loss.backward()
            found.append(loss.item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        assert found == losses
        state = model.state_dict()
        assert [name for name, value in weights.items() if not torch.equal(state[name], value)] == []


def test_where_updates_are_made_is_said(tmp_path: Path) -> None:
    for where, words in (("auto", "penstock calibrate"), ("device", "on the device, as asked for")):
        with prepared_on(tmp_path / where, PLENTY, update_on=where) as (model, _):
            assert words in " ".join(str(penstock.explain(model)).split())
    with pytest.raises(penstock.UsageError, match='update_on="device" has no device to update on: the CPU'):
        penstock.prepare(
            make(),
            optimizer=penstock.AdamW(),
            disk=tmp_path / "no",
            device="cpu",
            update_on="device",
            max_memory={"host": PLENTY},
        )
    with pytest.raises(penstock.UsageError, match="update_on is 'gpu': use auto, cpu, device"):
        penstock.prepare(make(), optimizer=penstock.AdamW(), disk=tmp_path / "no", update_on="gpu")  # type: ignore[arg-type]


def step_to_the_end(optimizer: Any) -> None:
    """What an update meets may be told while others are still being submitted."""
    optimizer.step()
    optimizer.training.finish()


def test_what_fails_on_the_device_ends_the_run_and_nothing_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        def work() -> None:
            raise RuntimeError("a kernel was lost")

        return work

    with prepared_on(tmp_path / "run", PLENTY, update_on="device") as (model, optimizer):
        backward(model)
        monkeypatch.setattr(deviceupdates, "_update", fail)
        with pytest.raises(Exception, match="a kernel was lost"):
            step_to_the_end(optimizer)
        with pytest.raises(Exception, match="a kernel was lost"):
            backward(model)
