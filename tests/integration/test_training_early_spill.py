"""Updates that begin in backward where gradients have to wait: experts without tokens, sums of several passes."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_reference import PLENTY, Case, Reference, Streamed
from training_reference import smallest as smallest_budgets
from zoo import differences

import penstock
from penstock.memory.errors import DiskError, DoesNotFitError, PenstockError
from penstock.runtime.training import room, selection
from penstock.runtime.training.early import BEHIND, EarlySteps
from penstock.runtime.training.spill import GradientSpill

pytestmark = pytest.mark.usefixtures("one_thread", "short_shards")
EXPERTS = 4


@pytest.fixture
def short_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards so short that the buffers which gradients pass through are less than all of them."""
    for user in (room, selection):
        monkeypatch.setattr(user, "ELEMENTS", 1024)


class Layer(nn.Module):
    """Several experts that are lent together; two of them get all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterList(torch.randn(48, 48) / 16 for _ in range(EXPERTS))

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        for number in (chosen, 3 * chosen + 1):
            x = x + torch.tanh(x @ self.experts[number % EXPERTS])
        return x


class Experts(nn.Module):
    """Layers of which no step reaches all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(20))
        self.out = nn.Linear(48, 4)

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        for depth, layer in enumerate(self.layers):
            x = layer(x, chosen + depth)
        made: Tensor = self.out(x)
        return made


def loss_of(model: Any, batch: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(batch)).to(dtype)
    loss: Tensor = model(x, chosen=batch).square().mean()
    return loss


CASE = Case(
    name="experts",
    make=Experts,
    losses=(loss_of,),
    optimizer=penstock.AdamW(lr=1e-2, weight_decay=0.1),
    dtype=torch.bfloat16,
    steps=6,
)


def prepare(case: Case, folder: Path, host: int) -> Streamed:
    return Streamed(
        *penstock.prepare(
            case.build(),
            optimizer=case.optimizer,
            disk=folder,
            max_memory={"host": host},
            device="cpu",
            accumulate=case.accumulate,
            updates="backward",
        )
    )


def smallest(case: Case, folder: Path) -> Streamed:
    with pytest.raises(DoesNotFitError) as caught:
        prepare(case, folder, 1)
    return prepare(case, folder, caught.value.needed_nbytes)


class Watched:
    """Sees what goes to disk, and how much of gradients there is in memory after each has come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent = 0
        self.most = 0
        put, arrived = GradientSpill.put, EarlySteps.arrived

        def putting(spill: GradientSpill, index: int, flat: Tensor) -> None:
            self.sent += 1
            put(spill, index, flat)

        def arriving(early: EarlySteps, index: int, gradient: Tensor) -> None:
            arrived(early, index, gradient)
            assert early.waiting_nbytes <= early.hold_nbytes
            gradients = early._step.gradients if early._step is not None else []
            spill = early._gradients.spill
            there = [
                each.nbytes
                for number, each in enumerate(gradients)
                if isinstance(each, Tensor) and spill is not None and number in spill
            ]
            self.most = max(self.most, sum(there))
            assert spill is None or sum(there) <= (BEHIND + 1) * early.hold_nbytes

        monkeypatch.setattr(GradientSpill, "put", putting)
        monkeypatch.setattr(EarlySteps, "arrived", arriving)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("budget", ["smallest", "plenty"])
def test_experts_without_tokens_and_sums_have_the_bits_of_the_resident_run(
    budget: str, passes: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CASE, batches=passes, dtype=dtype)
    watched = Watched(monkeypatch)
    trainer = smallest(case, tmp_path / "run") if budget == "smallest" else prepare(case, tmp_path / "run", PLENTY)
    reference = Reference(case)
    try:
        for step in range(case.steps):
            for batch in range(step * passes, (step + 1) * passes):
                for each in (reference, trainer):
                    each.backward(loss_of(each.model, batch))
            reference.step()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        assert differences(reference.state(), trainer.state()) == []
        if passes == 1 and budget == "smallest":  # blocks of few parameters, most of which are whole or not there
            return
        assert (watched.sent > 0) == (budget == "smallest" or passes == 1)
        if passes < 3:  # of three, none is whole before step(): each batch has other experts
            assert (watched.most > 0) == (watched.sent > 0)
    finally:
        penstock.close(trainer.model)


class Mixed(Experts):
    """Layers of which every other one gets tokens for all of its experts, and the others for one."""

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        for depth, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            for expert in list(layer.experts)[: 1 if depth % 2 else EXPERTS]:
                x = x + torch.tanh(x @ expert)
        made: Tensor = self.out(x)
        return made


@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize(("make", "passes"), [(Experts, 1), (Experts, 2), (Mixed, 1)])
def test_places_beside_a_device_apart_are_given_back_where_more_are_needed(
    make: type[Experts], passes: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CASE, make=make, batches=passes)
    watched, full = Watched(monkeypatch), []

    def place(memory: dict[str, int], device: str) -> Any:
        return penstock.prepare(
            case.build(),
            optimizer=case.optimizer,
            disk=tmp_path / "run",
            max_memory=memory,
            device=device,
            accumulate=passes,
            updates="backward",
            update_on=where,
            activations="keep",
        )

    device, memory = smallest_budgets(place, "emulated")
    memory["host"] += 100_000  # so that experts of a layer are one block, and all gradients have no places
    free = EarlySteps.free_place
    monkeypatch.setattr(EarlySteps, "free_place", lambda early: (full.append(len(early._waiting)), free(early))[1])
    trainer, reference = Streamed(*place(memory, device)), Reference(case)
    try:
        assert trainer.optimizer.training.gradients.intake.pool is not None
        engine = trainer.model.penstock.machinery.engine
        plain = engine.pwrite
        engine.pwrite = lambda *arguments: (time.sleep(0.002), plain(*arguments))[1]  # updates are what is slow
        for step in range(4):
            for batch in range(step * passes, (step + 1) * passes):
                for each in (reference, trainer):
                    each.backward(loss_of(each.model, batch))
            reference.step()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        assert differences(reference.state(), trainer.state()) == []
        assert watched.sent > 0
        assert any(full) == (make is Mixed)
    finally:
        penstock.close(trainer.model)


def test_fewer_passes_than_there_could_be(tmp_path: Path) -> None:
    case = replace(CASE, batches=3)
    trainer, reference = smallest(case, tmp_path / "run"), Reference(case)
    try:
        for batches in ((0,), (1, 2), (3, 4, 5), (6,)):
            for batch in batches:
                for each in (reference, trainer):
                    each.backward(loss_of(each.model, batch))
            reference.step()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        assert differences(reference.state(), trainer.state()) == []
    finally:
        penstock.close(trainer.model)


def test_sums_that_are_dropped_before_anything_was_updated_are_not_used(tmp_path: Path) -> None:
    case = replace(CASE, batches=2)
    trainer, reference = smallest(case, tmp_path / "run"), Reference(case)
    try:
        trainer.backward(loss_of(trainer.model, 9))
        trainer.optimizer.zero_grad()
        for batch in range(2):
            for each in (reference, trainer):
                each.backward(loss_of(each.model, batch))
        reference.step()
        trainer.step()
        assert differences(reference.state(), trainer.state()) == []
    finally:
        penstock.close(trainer.model)


def test_sums_are_read_and_written_once_less_than_passes(tmp_path: Path) -> None:
    """The first pass writes them, the last one reads them, and what is whole goes to its update from memory."""
    case = replace(CASE, batches=3)
    trainer = smallest(case, tmp_path / "run")
    try:
        spill = trainer.optimizer.training.gradients.spill
        engine, moved = trainer.model.penstock.machinery.engine, {"read": 0, "written": 0}
        read, write = engine.pread, engine.pwrite

        def counting(name: str, plain: Any) -> Any:
            def call(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
                count: int = plain(fd, buffers, offset)
                if os.readlink(f"/proc/self/fd/{fd}").endswith("gradients.bin"):
                    moved[name] += count
                return count

            return call

        engine.pread, engine.pwrite = counting("read", read), counting("written", write)
        for _ in range(3):
            trainer.backward(loss_of(trainer.model, 0))  # the same experts in all passes
        trainer.step()
        trainer.optimizer.training.finish()
        reached = {index for index, count in enumerate(trainer.optimizer.training.counts) if count}
        pieces = [place for index in spill._spilled & reached for place in spill._places[index]]
        once = sum(spill._piece_nbytes(place.piece) for place in pieces)
        again = moved["written"] - 2 * once  # of blocks that were not whole
        assert again >= 0
        assert moved["read"] == 2 * once + again
    finally:
        penstock.close(trainer.model)


def test_a_drive_that_fails_in_the_middle_of_a_step_ends_the_run(tmp_path: Path) -> None:
    trainer = smallest(CASE, tmp_path / "run")
    try:
        trainer.backward(loss_of(trainer.model, 0))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        penstock.save(trainer.model, trainer.optimizer).wait()
        engine = trainer.model.penstock.machinery.engine
        plain = engine.pwrite

        def fail(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if os.readlink(f"/proc/self/fd/{fd}").endswith("gradients.bin"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return plain(fd, buffers, offset)

        engine.pwrite = fail

        def attempt() -> None:
            trainer.backward(loss_of(trainer.model, 1))
            trainer.optimizer.step()

        match = r"gradient of layers.*gradients\.bin.*last commit with penstock\.resume"
        with pytest.raises(DiskError, match=match):
            attempt()
        engine.pwrite = plain
        for use in (trainer.optimizer.step, lambda: penstock.save(trainer.model, trainer.optimizer)):
            with pytest.raises(PenstockError, match=r"last commit with penstock\.resume"):
                use()
    finally:
        penstock.close(trainer.model)
    model, optimizer = penstock.resume(
        tmp_path / "run", model=CASE.build(), max_memory={"host": PLENTY}, device="cpu", updates="backward"
    )
    reference = Reference(CASE)
    reference.backward(loss_of(reference.model, 0))
    reference.step()
    assert differences(reference.state(), Streamed(model, optimizer).state()) == []
    penstock.close(model)
