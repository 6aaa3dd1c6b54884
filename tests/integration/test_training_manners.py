"""What a training refuses, and what torch's own tools find where they expect plain gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_cases import CASES
from training_reference import Case, Reference, Streamed, prepared
from zoo import differences

import penstock
from penstock import NonFiniteGradientError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # transformers' own
]
CASE = replace(CASES["tied"], name="manners", steps=3)


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Streamed]:
    made = prepared(CASE, tmp_path / "run", "smallest")
    yield made
    penstock.close(made.model)


@pytest.fixture
def reference() -> Reference:
    return Reference(CASE)


def loss_of(trainer: Any, batch: int) -> Tensor:
    return CASE.losses[0](trainer.model, batch)


def both(reference: Reference, trainer: Streamed, batch: int) -> None:
    for each in (reference, trainer):
        each.backward(loss_of(each, batch))


def test_one_backward_too_many(trainer: Streamed, reference: Reference) -> None:
    trainer.backward(loss_of(trainer, 0))
    with pytest.raises(penstock.UsageError, match=r"accumulate=2"):
        trainer.backward(loss_of(trainer, 1))
    trainer.optimizer.zero_grad()
    both(reference, trainer, 2)
    assert torch.equal(reference.step(), trainer.step())
    assert differences(reference.state(), trainer.state()) == []


def test_a_third_backward_where_two_were_announced(tmp_path: Path) -> None:
    made = Streamed(
        *penstock.prepare(
            CASE.build(),
            optimizer=CASE.optimizer,
            disk=tmp_path / "run",
            device="cpu",
            accumulate=2,
            max_memory={"host": 2**30},
        )
    )
    try:
        for batch in range(2):
            made.backward(loss_of(made, batch))
        with pytest.raises(penstock.UsageError, match=r"2 backward passes.*accumulate=3"):
            made.backward(loss_of(made, 2))
    finally:
        penstock.close(made.model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("skip", [False, True])
def test_gradients_that_are_not_finite_change_nothing(skip: bool, value: float, tmp_path: Path) -> None:
    reference = Reference(CASE)
    trainer = Streamed(
        *penstock.prepare(
            CASE.build(),
            optimizer=CASE.optimizer,
            disk=tmp_path / "run",
            device="cpu",
            max_memory={"host": 2**30},
            nonfinite="skip" if skip else "raise",
        )
    )
    try:
        both(reference, trainer, 0)
        assert torch.equal(reference.step(), trainer.step())
        trainer.backward(loss_of(trainer, 1) * value)
        if skip:
            trainer.step()
        else:
            with pytest.raises(NonFiniteGradientError, match="nothing was changed"):
                trainer.step()
            trainer.optimizer.zero_grad()
        assert differences(reference.state(), trainer.state()) == []
        both(reference, trainer, 2)
        assert torch.equal(reference.step(), trainer.step())
        assert differences(reference.state(), trainer.state()) == []
    finally:
        penstock.close(trainer.model)


def clip_plainly(reference: Reference, batch: int, *norms: float, **options: Any) -> list[Tensor]:
    """Backward and torch's own clipping, on gradients of the parameters' dtype; what it says."""
    loss_of(reference, batch).backward()
    said = [torch.nn.utils.clip_grad_norm_(reference.parameters.values(), norm, **options) for norm in norms]
    for name, parameter in reference.parameters.items():
        assert parameter.grad is not None
        reference.masters[name].grad, parameter.grad = parameter.grad.float(), None
    return said


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("norms", [(1e-3,), (1e6,), (0.5, 0.25), (float("inf"), 0.1)])
def test_clipping_by_torch_is_that_of_a_plain_model(
    norms: tuple[float, ...], foreach: bool | None, trainer: Streamed, reference: Reference
) -> None:
    for batch in range(3):
        expected = clip_plainly(reference, batch, *norms, foreach=foreach)
        trainer.backward(loss_of(trainer, batch))
        found = [torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), norm, foreach=foreach) for norm in norms]
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert torch.equal(reference.step(), trainer.step())
    assert differences(reference.state(), trainer.state()) == []


def test_clipping_by_torch_of_a_few_parameters_and_what_is_added_behind(tmp_path: Path) -> None:
    """Gradients of several backward passes are in fp32, and so are their norms."""
    case = replace(CASE, name="added up", batches=2)
    reference, made = Reference(case), prepared(case, tmp_path / "run", "smallest")
    try:
        for batch in range(2):
            both(reference, made, batch)
            few = [name for name, parameter in made.model.named_parameters() if parameter.dim() == 2][:3]
            expected = torch.nn.utils.clip_grad_norm_([reference.masters[name] for name in few], 0.01)
            found = torch.nn.utils.clip_grad_norm_([made.model.get_parameter(name) for name in few], 0.01)
            assert torch.equal(expected, found)
        assert torch.equal(reference.step(), made.step())
        assert differences(reference.state(), made.state()) == []
    finally:
        penstock.close(made.model)


def test_clipping_where_updates_begin_in_backward_raises_at_once(tmp_path: Path) -> None:
    made = Streamed(
        *penstock.prepare(
            CASE.build(),
            optimizer=CASE.optimizer,
            disk=tmp_path / "run",
            device="cpu",
            max_memory={"host": 2**30},
            updates="backward",
        )
    )
    try:
        made.backward(loss_of(made, 0))
        with pytest.raises(penstock.UsageError, match='leave updates="backward" out'):
            torch.nn.utils.clip_grad_norm_(made.model.parameters(), 1e6)
        made.step()
    finally:
        penstock.close(made.model)


@pytest.mark.parametrize("foreach", [None, False])
def test_clipping_of_values_raises_instead_of_doing_nothing(trainer: Streamed, foreach: bool | None) -> None:
    trainer.backward(loss_of(trainer, 0))
    with pytest.raises(penstock.UsageError, match=r"max_grad_norm=1\.0"):
        torch.nn.utils.clip_grad_value_(trainer.model.parameters(), 1e-3, foreach=foreach)


@pytest.mark.parametrize("cleared", ["optimizer", "model", "hand", "never"])
def test_gradients_that_nobody_cleared_after_a_step(cleared: str, trainer: Streamed, reference: Reference) -> None:
    """PyTorch would add the next ones to them; they are gone, so this is refused. `.grad` stays, as in PyTorch."""
    both(reference, trainer, 0)
    reference.step()
    trainer.optimizer.step()
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())
    if cleared == "optimizer":
        trainer.optimizer.zero_grad()
    elif cleared == "model":
        trainer.model.zero_grad()
    elif cleared == "hand":
        for parameter in trainer.model.parameters():
            parameter.grad = None
    else:
        with pytest.raises(penstock.UsageError, match=r"optimizer\.zero_grad\(\) after each step"):
            trainer.backward(loss_of(trainer, 1))
        trainer.optimizer.zero_grad()
    both(reference, trainer, 1)
    assert torch.equal(reference.step(), trainer.step())
    trainer.optimizer.step()  # once more, for nothing: there is no gradient
    assert differences(reference.state(), trainer.state()) == []


def test_a_norm_without_clipping_is_the_norm(trainer: Streamed, reference: Reference) -> None:
    """As transformers' Trainer asks for it, to show it."""
    both(reference, trainer, 0)
    plain = CASE.build()
    CASE.losses[0](plain, 0).backward()
    for norm_type in (2.0, float("inf")):
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), float("inf"), norm_type)
        found = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), float("inf"), norm_type)
        assert torch.equal(expected, found)
    assert torch.equal(reference.step(), trainer.step())
    assert differences(reference.state(), trainer.state()) == []


def test_a_gradient_says_what_it_is_and_no_values(trainer: Streamed) -> None:
    trainer.backward(loss_of(trainer, 0))
    for parameter in trainer.model.parameters():
        assert parameter.grad is not None
        assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, parameter.dtype)
        assert "TakenGradient" in repr(parameter.grad)
        for use in (lambda g: g * 2, lambda g: g.mul_(g), lambda g: g.sum(), lambda g: g.tolist()):
            with pytest.raises(penstock.UsageError, match="streamed model"):
                use(parameter.grad)
    trainer.step()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_gradient_scaler_is_refused(trainer: Streamed) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(trainer, 0)).backward()
    with pytest.raises(penstock.UsageError, match="no GradScaler"):
        scaler.step(trainer.optimizer)


def test_a_gradient_scaler_that_is_off_does_no_harm(trainer: Streamed, reference: Reference) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    both(reference, trainer, 0)
    reference.step()
    scaler.unscale_(trainer.optimizer)
    scaler.step(trainer.optimizer)
    scaler.update()
    assert differences(reference.state(), trainer.state()) == []


@pytest.mark.parametrize("by", ["optimizer", "model", "hand", "hand and again"])
def test_gradients_that_are_dropped_are_not_used(by: str, trainer: Streamed, reference: Reference) -> None:
    trainer.backward(loss_of(trainer, 0))
    if by == "optimizer":
        trainer.optimizer.zero_grad()
    elif by == "model":
        trainer.model.zero_grad()
    else:
        for parameter in trainer.model.parameters():
            parameter.grad = None
    if by == "hand":
        both(reference, trainer, 1)
        name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if p.dim() == 2)
        parameter.grad = None
        reference.masters[name].grad = None
    else:
        both(reference, trainer, 1)
    assert torch.equal(reference.step(), trainer.step())
    assert differences(reference.state(), trainer.state()) == []


def test_gradients_that_are_put_there_are_used(trainer: Streamed, reference: Reference) -> None:
    both(reference, trainer, 0)
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if p.dim() == 2)
    mine = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)).to(parameter.dtype)
    parameter.grad = mine.clone()
    reference.masters[name].grad = mine.float()
    assert torch.equal(reference.step(), trainer.step())
    assert differences(reference.state(), trainer.state()) == []


def test_gradients_of_a_loss_by_themselves_leave_the_others_alone(trainer: Streamed, reference: Reference) -> None:
    both(reference, trainer, 0)
    weights = list(trainer.model.parameters())
    alone = torch.autograd.grad(loss_of(trainer, 1), weights)
    plain = torch.autograd.grad(loss_of(reference, 1), list(reference.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(alone, plain, strict=True))
    assert torch.equal(reference.step(), trainer.step())
    assert differences(reference.state(), trainer.state()) == []


def test_a_step_without_gradients_changes_nothing(trainer: Streamed, reference: Reference) -> None:
    trainer.optimizer.step()
    assert differences(reference.state(), trainer.state()) == []


def test_a_step_with_a_closure(trainer: Streamed, reference: Reference) -> None:
    def closure() -> Tensor:
        trainer.optimizer.zero_grad()
        loss = loss_of(trainer, 0)
        loss.backward()
        return loss

    loss = trainer.optimizer.step(closure)
    expected = loss_of(reference, 0)
    reference.backward(expected)
    reference.step()
    assert torch.equal(loss, expected)
    assert differences(reference.state(), trainer.state()) == []


def test_parameters_that_are_added_later_are_refused(trainer: Streamed) -> None:
    groups = [dict(group) for group in trainer.optimizer.param_groups]
    with pytest.raises(penstock.UsageError, match="settled when it is prepared"):
        trainer.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert trainer.optimizer.param_groups == groups


def test_states_of_the_optimizer_are_not_a_checkpoint(trainer: Streamed) -> None:
    before = trainer.optimizer.state_dict()
    trainer.optimizer.param_groups[0]["lr"] = 1.0
    trainer.optimizer.load_state_dict(before)
    assert trainer.optimizer.param_groups[0]["lr"] == CASE.optimizer.defaults()["lr"]
    trainer.backward(loss_of(trainer, 0))
    trainer.step()
    with pytest.raises(penstock.UsageError, match=r"penstock\.resume"):
        trainer.optimizer.load_state_dict(before)
    with pytest.raises(penstock.UsageError, match=r"penstock\.resume"):
        trainer.optimizer.load_state_dict(torch.optim.AdamW(trainer.model.parameters()).state_dict())


def test_what_is_wrong_is_said_before_anything_is_moved(tmp_path: Path) -> None:
    model = CASE.build()
    for choice, match in (
        ({"lr": -1.0}, "lr"),
        ({"lr": 1e-3, "groups": {"*bias": {"rate": 1}}}, "rate"),
        ({"lr": 1e-3, "max_grad_norm": 0.0}, "max_grad_norm"),
    ):
        with pytest.raises(penstock.UsageError, match=match):
            penstock.AdamW(**choice)  # type: ignore[arg-type]
    model.requires_grad_(False)
    with pytest.raises(penstock.UsageError, match="requires_grad"):
        penstock.prepare(model, optimizer=CASE.optimizer, disk=tmp_path / "run", device="cpu")


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    case = Case(
        name="no such group",
        make=CASE.make,
        losses=CASE.losses,
        optimizer=penstock.AdamW(lr=1e-3, groups={"*beta": {"lr": 1e-4}}),
        dtype=CASE.dtype,
    )
    with pytest.raises(penstock.UsageError, match=r"'\*beta' matches none"):
        prepared(case, tmp_path / "run", "resident")
