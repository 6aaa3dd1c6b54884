"""A run that goes on from a commit has the bits of one that was never interrupted."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_cases import CASES, warmup
from training_reference import PLENTY, Case, Streamed, Trace, prepared, resident, run, scheduled, smallest
from zoo import differences

import penstock
from penstock.memory.errors import StoreBusyError, StoreError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # transformers' own
]


def resumed(case: Case, folder: Path, placement: str) -> Streamed:
    """The run of a folder, at one of the placements. The random numbers are not what they were."""
    torch.manual_seed(99)

    def place(memory: dict[str, int], device: str) -> Any:
        return penstock.resume(
            folder,
            model=case.build(),
            max_memory=memory,
            device=device,
            accumulate=case.accumulate,
            scheduler=None if case.schedule is None else partial(scheduled, case),
        )

    device, memory = smallest(place, placement)
    return Streamed(*place(memory, device))


def begin(case: Case, folder: Path, placement: str, *, steps: int, beyond: int = 0) -> None:
    """Train from the start, commit, train on a little, and leave."""
    trainer = prepared(case, folder, placement)
    try:
        torch.manual_seed(7)
        schedule = scheduled(case, trainer.optimizer)
        run(case, trainer, schedule, range(steps), Trace())
        penstock.save(trainer.model, trainer.optimizer, scheduler=schedule, extra={"next": steps}).wait()
        run(case, trainer, schedule, range(steps, steps + beyond), Trace())
    finally:
        penstock.close(trainer.model)


def check_rest(case: Case, folder: Path, placement: str, *, first: int) -> None:
    """Go on to the end, and compare with a run that was not interrupted."""
    trainer, trace = resumed(case, folder, placement), Trace()
    try:
        assert trainer.optimizer.extra == {"next": first}
        run(case, trainer, trainer.optimizer.scheduler, range(first, case.steps), trace)
        expected, left = resident(case)
        assert differences(expected.since(first, case).outputs(), trace.outputs()) == []
        assert differences(dict(left), trainer.state()) == []
    finally:
        penstock.close(trainer.model)


WAYS = [
    ("resident", "resident"),
    ("resident", "smallest"),
    ("smallest", "resident"),
    ("smallest", "emulated"),
    ("emulated", "smallest"),
]


@pytest.mark.parametrize(("before", "after"), WAYS)
@pytest.mark.parametrize("name", ["gpt2", "perceptron-lion"])
def test_a_run_goes_on_under_the_same_and_other_budgets(name: str, before: str, after: str, tmp_path: Path) -> None:
    begin(CASES[name], tmp_path / "run", before, steps=4, beyond=2)
    check_rest(CASES[name], tmp_path / "run", after, first=4)


@pytest.mark.parametrize("name", ["llama", "t5", "u-net", "perceptron"])
def test_every_kind_of_run_goes_on(name: str, tmp_path: Path) -> None:
    begin(CASES[name], tmp_path / "run", "smallest", steps=5)
    check_rest(CASES[name], tmp_path / "run", "smallest", first=5)


def test_a_run_goes_on_twice(tmp_path: Path) -> None:
    case, folder = CASES["gpt2"], tmp_path / "run"
    begin(case, folder, "smallest", steps=2)
    trainer = resumed(case, folder, "resident")
    try:
        run(case, trainer, trainer.optimizer.scheduler, range(2, 5), Trace())
        penstock.save(trainer.model, trainer.optimizer, scheduler=trainer.optimizer.scheduler, extra={"next": 5}).wait()
    finally:
        penstock.close(trainer.model)
    check_rest(case, folder, "smallest", first=5)


def test_the_same_commit_can_be_gone_on_from_again(tmp_path: Path) -> None:
    case, folder = CASES["gpt2"], tmp_path / "run"
    begin(case, folder, "smallest", steps=6)
    for _ in range(2):
        check_rest(case, folder, "smallest", first=6)


def test_save_returns_before_the_commit_is_there_and_training_goes_on(tmp_path: Path) -> None:
    case, folder = CASES["gpt2"], tmp_path / "run"
    trainer = prepared(case, folder, "smallest")
    commits = []
    try:
        torch.manual_seed(7)
        schedule = scheduled(case, trainer.optimizer)
        for step in range(5):
            run(case, trainer, schedule, range(step, step + 1), Trace())
            extra = {"next": step + 1}
            commits.append(penstock.save(trainer.model, trainer.optimizer, scheduler=schedule, extra=extra))
        commits[-1].wait()
        run(case, trainer, schedule, range(5, 6), Trace())
    finally:
        penstock.close(trainer.model)
    check_rest(case, folder, "smallest", first=5)


def test_a_scheduler_that_no_commit_has_begins_anew_and_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = replace(CASES["perceptron"], schedule=None, steps=1)
    trainer = prepared(case, tmp_path / "run", "resident")
    try:
        run(case, trainer, None, range(1), Trace())
        penstock.save(trainer.model, trainer.optimizer).wait()
    finally:
        penstock.close(trainer.model)
    with caplog.at_level(logging.WARNING, logger="penstock"):
        again = resumed(replace(case, schedule=warmup), tmp_path / "run", "resident")
    try:
        assert "has no state of a scheduler" in caplog.text
        rates = [group["lr"] for group in again.optimizer.param_groups]
        assert rates == [group["initial_lr"] / 4 for group in again.optimizer.param_groups]
    finally:
        penstock.close(again.model)


def test_nothing_was_committed(tmp_path: Path) -> None:
    case = CASES["perceptron"]
    penstock.close(prepared(case, tmp_path / "run", "resident").model)
    with pytest.raises(StoreError, match=r"no commit yet.*prepare"):
        penstock.resume(tmp_path / "run", model=case.build(), device="cpu")
    with pytest.raises(StoreError):
        penstock.resume(tmp_path / "nowhere", model=case.build(), device="cpu")


def test_another_model_is_refused_and_the_run_is_whole(tmp_path: Path) -> None:
    case, folder = CASES["perceptron"], tmp_path / "run"
    begin(case, folder, "resident", steps=6)

    def resume(model: nn.Module | None) -> Any:
        return penstock.resume(folder, model=model, device="cpu", max_memory={"host": PLENTY})

    wider = case.build()
    wider.outputs = nn.Linear(96, 9).bfloat16()
    with pytest.raises(penstock.UsageError, match="another model"):
        resume(wider)
    with pytest.raises(penstock.UsageError, match="not in this model"):
        resume(CASES["gpt2"].build())
    with pytest.raises(penstock.UsageError, match=r"model=…"):
        resume(None)
    check_rest(case, folder, "resident", first=6)


def test_a_folder_that_is_in_use_or_taken_is_refused(tmp_path: Path) -> None:
    case, folder = CASES["perceptron"], tmp_path / "run"
    trainer = prepared(case, folder, "resident")
    try:
        penstock.save(trainer.model, trainer.optimizer).wait()
        with pytest.raises(StoreBusyError):
            resumed(case, folder, "resident")
        with pytest.raises(StoreError):
            prepared(case, folder, "resident")
        trainer.backward(case.losses[0](trainer.model, 0))
        trainer.step()
    finally:
        penstock.close(trainer.model)
    with pytest.raises(StoreError, match="resume"):
        prepared(case, folder, "resident")
    penstock.close(resumed(case, folder, "resident").model)
