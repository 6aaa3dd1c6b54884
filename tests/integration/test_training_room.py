"""Gradients on disk, states in host memory, in whatever parts a budget allows: the same bits, also across commits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_manners import CASE as MANNERS
from test_training_manners import clip_plainly, loss_of
from training_cases import CASES
from training_reference import (
    EMULATED,
    PLENTY,
    Case,
    Reference,
    Streamed,
    Trace,
    find_placement,
    resident,
    run,
    scheduled,
    smallest,
)
from zoo import differences

import penstock
from penstock.runtime.training import room, selection
from penstock.runtime.training.shards import SMALL

pytestmark = [
    pytest.mark.usefixtures("one_thread", "short_shards"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # transformers' own
]
PARTS = {"spilled": 0.0, "partly spilled": 0.08, "states partly": 0.75, "states resident": 1.0}
"""Of the way from the least budget to what is of any use."""
SHORT = {name: replace(case, steps=4) for name, case in CASES.items()}
LARGER = ("llama", "gpt2", "t5")
LONGER = {name: replace(case, steps=6) for name, case in CASES.items()}


@pytest.fixture
def short_shards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards so short that small models have many, and the buffers that gradients pass through are less than all."""
    spec = getattr(request.node, "callspec", None)
    name = spec.params.get("name", "") if spec is not None else ""
    for user in (room, selection):
        monkeypatch.setattr(user, "ELEMENTS", 4096 if name in LARGER else 2048 if name == "mixtral" else 1024)


def prepare(case: Case, folder: Path, memory: dict[str, int], device: str) -> Streamed:
    return Streamed(
        *penstock.prepare(
            case.build(),
            optimizer=case.optimizer,
            disk=folder,
            max_memory=memory,
            device=device,
            accumulate=case.accumulate,
            activations="keep",  # or they would have a part of the budget
        )
    )


def budget(case: Case, folder: Path, part: str, placement: str = "smallest") -> tuple[str, dict[str, int]]:
    """Device and budgets for one of `PARTS`."""
    device, memory = find_placement(case, folder / "asked", placement)
    whole = prepare(case, folder / "whole", {**memory, "host": PLENTY}, device)
    most = whole.model.penstock.plan.host_nbytes
    penstock.close(whole.model)
    return device, {**memory, "host": memory["host"] + int(PARTS[part] * (most - memory["host"]))}


def kept(trainer: Streamed) -> tuple[int, int, int]:
    """How many gradients go to disk, how many shards stay in memory, and of how many."""
    training = trainer.optimizer.training
    spill, residents = training.gradients.spill, training._pipeline._residents
    return 0 if spill is None else len(spill._spilled), len(residents._shards), len(training._shards)


def finish(case: Case, trainer: Streamed) -> list[str]:
    """Train to the end; where it differs from the reference."""
    trace = Trace()
    torch.manual_seed(7)
    run(case, trainer, scheduled(case, trainer.optimizer), range(case.steps), trace)
    expected, left = resident(case)
    return differences(expected.outputs(), trace.outputs()) + differences(dict(left), trainer.state())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5", "u-net", "perceptron", "perceptron-lion"])
def test_every_part_has_the_bits_of_the_resident_run(name: str, part: str, tmp_path: Path) -> None:
    case = SHORT[name]
    trainer = prepare(case, tmp_path / "run", *reversed(budget(case, tmp_path, part)))
    try:
        on_disk, stay, shards = kept(trainer)
        spills = part == "spilled" or (part == "partly spilled" and name != "u-net")  # whose largest is most of all
        assert (on_disk > 0) == spills
        assert (stay == shards) == (part == "states resident")
        assert part != "states partly" or 0 < stay < shards
        assert finish(case, trainer) == []
    finally:
        penstock.close(trainer.model)


@pytest.mark.parametrize("part", ["spilled", "partly spilled", "states partly"])
@pytest.mark.parametrize("name", ["llama", "perceptron"])
def test_the_same_with_a_device_apart(name: str, part: str, tmp_path: Path) -> None:
    case = SHORT[name]
    device, memory = budget(case, tmp_path, part, "emulated")
    assert device == EMULATED
    trainer = prepare(case, tmp_path / "run", memory, device)
    try:
        on_disk, stay, shards = kept(trainer)
        assert stay < shards
        assert (on_disk > 0) == (part != "states partly")
        assert finish(case, trainer) == []
    finally:
        penstock.close(trainer.model)


@pytest.mark.parametrize("name", ["llama"])
def test_several_threads_have_the_bits_of_as_many(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    case = replace(CASES[name], name="on two threads", steps=2)
    trainer = prepare(case, tmp_path / "run", *reversed(budget(case, tmp_path, "spilled")))
    try:
        assert finish(case, trainer) == []
    finally:
        penstock.close(trainer.model)


WAYS = [
    ("gpt2", "spilled", "states resident"),
    ("gpt2", "states resident", "spilled"),
    ("perceptron-lion", "states partly", "states resident"),
    ("perceptron-lion", "states resident", "states partly"),
]


@pytest.mark.parametrize(("name", "before", "after"), WAYS)
def test_a_run_goes_on_under_another_budget(name: str, before: str, after: str, tmp_path: Path) -> None:
    case, folder = LONGER[name], tmp_path / "run"
    trainer = prepare(case, folder, *reversed(budget(case, tmp_path, before)))
    try:
        torch.manual_seed(7)
        schedule = scheduled(case, trainer.optimizer)
        for step in range(4):  # the commits are still being written when the steps after them change what they write
            run(case, trainer, schedule, range(step, step + 1), Trace())
            commit = penstock.save(trainer.model, trainer.optimizer, scheduler=schedule, extra={"next": step + 1})
        run(case, trainer, schedule, range(4, 6), Trace())
        commit.wait()
    finally:
        penstock.close(trainer.model)
    check_rest(case, folder, after, tmp_path)


def check_rest(case: Case, folder: Path, part: str, tmp_path: Path) -> None:
    """Go on after four steps, and compare with a run that was not interrupted."""

    def place(memory: dict[str, int], device: str) -> Any:
        return penstock.resume(
            folder,
            model=case.build(),
            max_memory=memory,
            device=device,
            accumulate=case.accumulate,
            scheduler=None if case.schedule is None else partial(scheduled, case),
        )

    torch.manual_seed(99)
    device, memory = smallest(place, "smallest")
    model, _ = place({"host": PLENTY}, device)
    most = model.penstock.plan.host_nbytes
    penstock.close(model)
    memory["host"] += int(PARTS[part] * (most - memory["host"]))
    trainer, trace = Streamed(*place(memory, device)), Trace()
    try:
        assert trainer.optimizer.extra == {"next": 4}
        run(case, trainer, trainer.optimizer.scheduler, range(4, case.steps), trace)
        expected, left = resident(case)
        assert differences(expected.since(4, case).outputs(), trace.outputs()) == []
        assert differences(dict(left), trainer.state()) == []
    finally:
        penstock.close(trainer.model)


def test_a_commit_right_before_the_end_is_published(tmp_path: Path) -> None:
    """States that are only in memory are on their way to disk when the model is closed."""
    case, folder = LONGER["gpt2"], tmp_path / "run"
    trainer = prepare(case, folder, {"host": PLENTY}, "cpu")
    torch.manual_seed(7)
    schedule = scheduled(case, trainer.optimizer)
    run(case, trainer, schedule, range(4), Trace())
    commit = penstock.save(trainer.model, trainer.optimizer, scheduler=schedule, extra={"next": 4})
    penstock.close(trainer.model)
    assert commit.done()
    assert commit.error is None
    check_rest(case, folder, "states partly", tmp_path)


def test_steps_with_everything_in_memory_move_nothing_and_a_commit_writes_states_once(tmp_path: Path) -> None:
    case = CASES["tied"]
    trainer = prepare(case, tmp_path / "run", {"host": PLENTY}, "cpu")
    try:

        def moved() -> tuple[int, int]:
            found = trainer.model.penstock.statistics()
            return found.disk_read_nbytes, found.disk_written_nbytes

        before = moved()
        run(case, trainer, None, range(3), Trace())
        trainer.optimizer.training.finish()
        assert moved() == before
        penstock.save(trainer.model, trainer.optimizer).wait()
        states = sum(3 * shard.array_nbytes for shard in trainer.optimizer.training._shards)
        assert moved() == (before[0], before[1] + states)
        penstock.save(trainer.model, trainer.optimizer).wait()  # nothing has changed since
        assert moved() == (before[0], before[1] + states)
    finally:
        penstock.close(trainer.model)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_steps_and_commits_write_is_known_before(name: str, part: str, tmp_path: Path) -> None:
    case = CASES[name]
    trainer = prepare(case, tmp_path / "run", *reversed(budget(case, tmp_path, part)))
    try:
        training = trainer.optimizer.training
        wear = training.wear()
        states = sum(3 * shard.array_nbytes for shard in training._shards)
        assert (wear.commit_nbytes > 0) == (part in ("states partly", "states resident"))
        assert (wear.step_nbytes == 0) == (part == "states resident")
        assert part != "spilled" or wear.step_nbytes > states

        def written() -> int:
            training.finish()
            return int(trainer.model.penstock.statistics().disk_written_nbytes)

        for step in range(2):
            before = written()
            run(case, trainer, None, range(step, step + 1), Trace())
            assert written() - before == wear.step_nbytes
            before = written()
            penstock.save(trainer.model, trainer.optimizer).wait()
            assert written() - before == wear.commit_nbytes
    finally:
        penstock.close(trainer.model)


def test_a_commit_does_not_wait_for_the_update_of_its_step(tmp_path: Path) -> None:
    """It has that step, and not the next one, which goes on without it."""
    case, folder = LONGER["gpt2"], tmp_path / "run"
    trainer = prepare(case, folder, *reversed(budget(case, tmp_path, "states partly")))
    go_on, stuck = threading.Event(), threading.Event()
    try:
        torch.manual_seed(7)
        schedule = scheduled(case, trainer.optimizer)
        run(case, trainer, schedule, range(3), Trace())
        training = trainer.optimizer.training
        training.finish()
        plain = training._pipeline._work

        def slow(taken: Any, *arguments: Any) -> None:
            if taken.shard.block != SMALL:  # else step() itself waits
                stuck.set()
                assert go_on.wait(20)
            plain(taken, *arguments)

        training._pipeline._work = slow
        run(replace(case, between=None), trainer, schedule, range(3, 4), Trace())
        commits = [
            penstock.save(trainer.model, trainer.optimizer, scheduler=schedule, extra={"next": 4}) for _ in range(2)
        ]
        assert stuck.wait(20)
        assert not any(commit.done() for commit in commits)
        assert commits[0].number + 1 == commits[1].number
        go_on.set()
        run(case, trainer, schedule, range(4, 6), Trace())
        for commit in commits:
            commit.wait()
    finally:
        go_on.set()
        penstock.close(trainer.model)
    check_rest(case, folder, "states resident", tmp_path)


@pytest.mark.parametrize("part", ["partly spilled", "states partly"])
def test_a_commit_whose_update_fails_says_so(part: str, tmp_path: Path) -> None:
    case = CASES["tied"]
    trainer = prepare(case, tmp_path / "run", *reversed(budget(case, tmp_path, part)))
    try:
        training, saved = trainer.optimizer.training, threading.Event()
        plain = training._pipeline._work

        def fail(taken: Any, *arguments: Any) -> None:
            if taken.shard.block != SMALL:
                assert saved.wait(20)
                raise penstock.DiskError("the drive is gone")
            plain(taken, *arguments)

        training._pipeline._work = fail
        backward(case, trainer, 0)
        trainer.optimizer.step()
        commit = penstock.save(trainer.model, trainer.optimizer)
        saved.set()
        with pytest.raises(penstock.DiskError, match="the drive is gone"):
            commit.wait(20)
        with pytest.raises(penstock.DiskError, match="the drive is gone"):
            penstock.save(trainer.model, trainer.optimizer)
    finally:
        penstock.close(trainer.model)


def test_the_plan_says_what_goes_where(tmp_path: Path) -> None:
    case = CASES["llama"]
    trainer = prepare(case, tmp_path / "run", *reversed(budget(case, tmp_path, "partly spilled")))
    try:
        said = str(penstock.explain(trainer.model))
        assert "gradients: " in said
        assert "masters and states: " in said
        plan = trainer.model.penstock.plan
        assert plan.host_nbytes <= plan.host_budget_nbytes
    finally:
        penstock.close(trainer.model)


@pytest.fixture
def spilling(tmp_path: Path) -> Iterator[tuple[Case, Streamed]]:
    """A training whose gradients are on disk, of two backward passes a step at most."""
    case = replace(CASES["tied"], name="spilling", losses=CASES["tied"].losses * 2, steps=3)
    trainer = prepare(case, tmp_path / "run", *reversed(budget(case, tmp_path, "spilled")))
    assert kept(trainer)[0]
    yield case, trainer
    penstock.close(trainer.model)


def backward(case: Case, trainer: Reference | Streamed, batch: int) -> None:
    trainer.backward(case.losses[0](trainer.model, batch))


def step_both(case: Case, trainer: Streamed, reference: Reference, *batches: int) -> None:
    for each in (reference, trainer):
        for batch in batches:
            backward(case, each, batch)
    assert torch.equal(reference.step(), trainer.step())
    assert differences(reference.state(), trainer.state()) == []


def test_fewer_passes_than_there_could_be(spilling: tuple[Case, Streamed]) -> None:
    case, trainer = spilling
    reference = Reference(case)
    step_both(case, trainer, reference, 0)
    step_both(case, trainer, reference, 1, 2)
    step_both(case, trainer, reference, 3)


@pytest.mark.parametrize("by", ["optimizer", "model", "one by hand"])
def test_gradients_that_are_dropped_are_not_used(by: str, spilling: tuple[Case, Streamed]) -> None:
    case, trainer = spilling
    reference = Reference(case)
    backward(case, trainer, 0)
    if by == "optimizer":
        trainer.optimizer.zero_grad()
    elif by == "model":
        trainer.model.zero_grad()
    else:
        backward(case, reference, 0)
        index = min(trainer.optimizer.training.gradients.spill._spilled)
        each = trainer.optimizer.training.trained[index]
        each.parameter.grad = None
        reference.masters[each.name].grad = None
    step_both(case, trainer, reference, 1)


def test_gradients_that_are_put_there_are_used(spilling: tuple[Case, Streamed]) -> None:
    case, trainer = spilling
    reference = Reference(case)
    for each in (reference, trainer):
        backward(case, each, 0)
    index = min(trainer.optimizer.training.gradients.spill._spilled)
    mine = trainer.optimizer.training.trained[index]
    value = torch.randn(mine.parameter.shape, generator=torch.Generator().manual_seed(5)).to(mine.parameter.dtype)
    mine.parameter.grad = value.clone()
    reference.masters[mine.name].grad = value.float()
    assert torch.equal(reference.step(), trainer.step())
    assert differences(reference.state(), trainer.state()) == []


def test_norms_are_those_of_gradients_that_are_on_disk(tmp_path: Path) -> None:
    """As transformers' Trainer asks for them, to show them: read back."""
    case = SHORT["tied"]
    trainer = prepare(case, tmp_path / "run", *reversed(budget(case, tmp_path, "spilled")))
    try:
        assert kept(trainer)[0]
        plain = case.build()
        case.losses[0](plain, 0).backward()
        backward(case, trainer, 0)
        for norm_type in (2.0, float("inf")):
            expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), float("inf"), norm_type)
            found = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), float("inf"), norm_type)
            assert torch.equal(expected, found)
    finally:
        penstock.close(trainer.model)


def test_a_step_that_is_skipped_leaves_everything_as_it_was(tmp_path: Path) -> None:
    case = replace(CASES["tied"], name="skipped", steps=3)
    device, memory = budget(case, tmp_path, "spilled")
    trainer = Streamed(
        *penstock.prepare(
            case.build(),
            optimizer=case.optimizer,
            disk=tmp_path / "run",
            device=device,
            max_memory=memory,
            nonfinite="skip",
        )
    )
    try:
        assert kept(trainer)[0]
        reference = Reference(case)
        step_both(case, trainer, reference, 0)
        trainer.backward(case.losses[0](trainer.model, 1) * float("nan"))
        trainer.step()
        assert differences(reference.state(), trainer.state()) == []
        step_both(case, trainer, reference, 2)
    finally:
        penstock.close(trainer.model)


def test_clipping_by_torch_multiplies_gradients_on_disk(tmp_path: Path) -> None:
    """They are read, multiplied, and written again; their norms, which nobody may see stale, with them."""
    reference = Reference(MANNERS)
    trainer = prepare(MANNERS, tmp_path / "run", *reversed(budget(MANNERS, tmp_path, "spilled")))
    try:
        on_disk, _, _ = kept(trainer)
        assert on_disk > 0
        for batch in range(3):
            norms = (0.5, 0.25, 1e6)
            expected = clip_plainly(reference, batch, *norms)
            trainer.backward(loss_of(trainer, batch))
            found = [torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), norm) for norm in norms]
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
            assert torch.equal(reference.step(), trainer.step())
        assert differences(reference.state(), trainer.state()) == []
    finally:
        penstock.close(trainer.model)
