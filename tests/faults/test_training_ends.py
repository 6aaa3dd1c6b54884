"""Steps that are no steps, and the ends of runs: no bit changes, and nothing is dropped without a word."""

from __future__ import annotations

import errno
import logging
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import breaking, fails
from training_child import CASES, STEPS
from training_reference import PLENTY, Streamed
from training_runs import begin, check_whole, resume

import penstock
from penstock.memory.errors import PenstockError
from penstock.runtime.training.early import NonFiniteGradientError

pytestmark = pytest.mark.usefixtures("one_thread", "states_on_disk")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_loss_that_is_no_number_changes_no_bit(nonfinite: Any, value: float, tmp_path: Path) -> None:
    run = begin(tmp_path / "run", nonfinite=nonfinite)
    try:
        before = run.trainer.state()
        model, optimizer = run.trainer.model, run.trainer.optimizer
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        generators = torch.get_rng_state()
        (CASES["step"].losses[0](model, 0) * value).backward()
        if nonfinite == "raise":
            with pytest.raises(NonFiniteGradientError, match="nothing was changed"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # the forward has changed these
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        torch.set_rng_state(generators)
        after = run.trainer.state()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    finally:
        run.close()
    check_whole(run.folder, run.host)


def test_a_gradient_that_is_no_number_after_blocks_were_updated(tmp_path: Path) -> None:
    """Updates that begin in backward cannot be taken back, but by going to the last commit."""
    run = begin(tmp_path / "run", "backward")
    try:
        loss = CASES["backward"].losses[0](run.trainer.model, 0) * float("nan")
        with pytest.raises(NonFiniteGradientError, match=r"penstock\.resume"):
            loss.backward()
        with pytest.raises(NonFiniteGradientError):
            run.save()
    finally:
        with suppress(PenstockError):
            run.close()
    check_whole(run.folder, run.host, "backward")


def _failing_write() -> AbstractContextManager[list[str]]:
    return breaking("pwritev", "blocks.data", fails(errno.EIO))


def test_closing_carries_the_last_step_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it met is raised there, if nobody has heard of it; and it says which steps no commit has."""
    run = begin(tmp_path / "run")
    training = run.trainer.optimizer.training
    seen: list[int] = []
    end = training._updater.end
    training._updater.end = lambda: (end(), seen.append(len(training._updater._unfinished)))
    run.go(6)
    with caplog.at_level(logging.WARNING):
        run.close()
    assert seen == [0]
    assert "2 steps after the last commit" in caplog.text
    caplog.clear()
    run = resume(run.folder, run.host)
    with caplog.at_level(logging.WARNING):
        run.close()
    assert "after the last commit" not in caplog.text


def test_closing_raises_what_the_last_step_met(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    with _failing_write():
        run.go(5)
        with pytest.raises(PenstockError, match=r"blocks\.data.*dmesg"):
            run.close()
    run.close()
    check_whole(run.folder, run.host)


def test_closing_after_an_error_raises_no_other(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    with _failing_write(), pytest.raises(PenstockError):
        run.go(STEPS)
    run.close()
    run = resume(run.folder, run.host)

    def end_in_another() -> None:
        try:
            run.go(5)
            raise KeyError("another")
        finally:
            run.close()

    with _failing_write(), pytest.raises(KeyError, match="another"):
        end_in_another()
    check_whole(run.folder, run.host)


def test_scratch_of_a_killed_process_goes(tmp_path: Path) -> None:
    """It is as large as the model; after some kills the drive would be full."""
    run = begin(tmp_path / "run")
    run.close()
    scratch = run.folder / "scratch"
    left = scratch / "penstock-0123456789abcdef"
    left.mkdir(parents=True)
    (left / "weights.bin").write_bytes(bytes(5000))
    mine = scratch / "notes"
    mine.mkdir()
    run = resume(run.folder, run.host)
    try:
        assert not left.exists()
        assert mine.is_dir()
    finally:
        run.close()


def test_a_group_that_comes_to_want_other_states(tmp_path: Path) -> None:
    case = CASES["backward"]
    made = penstock.prepare(
        case.build(), optimizer=penstock.SGD(lr=1e-2), disk=tmp_path / "run", device="cpu", max_memory={"host": PLENTY}
    )
    trainer = Streamed(*made)
    try:
        trainer.backward(case.losses[0](trainer.model, 0))
        trainer.step()
        trainer.optimizer.param_groups[0]["momentum"] = 0.9
        trainer.backward(case.losses[0](trainer.model, 1))
        with pytest.raises(penstock.UsageError, match=r"group 0.*momentum_buffer"):
            trainer.step()
        trainer.optimizer.param_groups[0]["momentum"] = 0.0
        trainer.step()
    finally:
        penstock.close(trainer.model)
    with pytest.raises(penstock.UsageError, match=r"'\*bias' keeps other states"):
        penstock.SGD(lr=1e-2, groups={"*bias": {"momentum": 0.9}})
