"""Layers of which only a part runs again, whatever they do beside operations of torch: the bits of plain training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_rooms import set_room, slow_processor
from test_training_activations import keeper_of
from torch import Tensor, nn
from torch.nn import functional
from training_reference import Case, Reference, prepared
from zoo import differences

import penstock
from penstock.runtime.activations import replay

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # transformers' own
]


class Doubled(torch.autograd.Function):
    """Twice its input, by numpy, as a kernel would that torch is not told of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 2


class Layer(nn.Module):
    """A residual block with a gate; `between` is done to what the products are given."""

    def __init__(self, between: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.into = nn.Linear(64, 64)
        self.gate, self.up, self.down = nn.Linear(64, 256), nn.Linear(64, 256), nn.Linear(256, 64)
        self.between = between
        self.calls = 0
        self.shown = torch.empty(0)
        """A sum that backward has no use for, as a hook may keep it."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x + self.between(self, self.into(x))
        self.shown = x.detach()
        y = functional.layer_norm(x.double(), (64,)).float()  # backward looks at the wider one, not at x
        y = functional.silu(self.gate(y)) * self.up(y)
        made: Tensor = x + self.down(y)
        return made


class Stack(nn.Module):
    """Some of them."""

    def __init__(self, between: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(between) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def by_numpy(_: Layer, x: Tensor) -> Tensor:
    made: Tensor = Doubled.apply(x)  # type: ignore[no-untyped-call]
    return made


def now_and_then(layer: Layer, x: Tensor) -> Tensor:
    """The same numbers, by one operation when a layer runs and by another when it runs again."""
    return x * 2 if layer.calls % 2 else x + x


def looked_at(_: Layer, x: Tensor) -> Tensor:
    return x * 2 if float(x.detach().sum()) > 0 else x * 3


def read_as_a_list(_: Layer, x: Tensor) -> Tensor:
    """In pieces, whose lengths come to Python by no operation: as vision transformers cut a sequence into images."""
    lengths = (x.detach() > -1e9).sum(1)
    return torch.cat([2 * piece for piece in x.flatten().split(lengths.tolist())]).view_as(x)


def read_by_numpy(_: Layer, x: Tensor) -> Tensor:
    return x * (1 + float((x.detach() * 3).numpy()[0, 0]))


def plain(_: Layer, x: Tensor) -> Tensor:
    return x * 2


def case_of(between: Callable[[Layer, Tensor], Tensor], *, changes_what_is_shown: bool = False) -> Case:
    def loss(model: Any, batch: int) -> Tensor:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(batch))
        found: Tensor = model(x).square().mean()
        for layer in model.layers if changes_what_is_shown else ():
            layer.shown.add_(1)
        return found

    return Case(
        name=between.__name__, make=lambda: Stack(between), losses=(loss,), optimizer=penstock.AdamW(lr=1e-3), steps=4
    )


@pytest.fixture
def diverged(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each second forward began anew."""
    found: list[bool] = []
    exit_plainly = replay.Replay.__exit__

    def noted(self: Any, kind: Any, *error: Any) -> Any:
        found.append(kind is not None and issubclass(kind, replay.DivergedError))
        return exit_plainly(self, kind, *error)

    monkeypatch.setattr(replay.Replay, "__exit__", noted)
    return found


@pytest.mark.parametrize("between", [plain, by_numpy, now_and_then, looked_at, read_as_a_list, read_by_numpy])
def test_a_part_of_a_layer_runs_again_with_the_bits_of_all_of_it(
    between: Callable[[Layer, Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, diverged: list[bool]
) -> None:
    set_room(monkeypatch, "kept")
    slow_processor(monkeypatch)
    case = case_of(between)
    trainer, reference = prepared(case, tmp_path / "run", "smallest", activations="auto"), Reference(case)
    try:
        for step in range(case.steps):
            for each in (reference, trainer):
                each.backward(case.losses[0](each.model, step))
                each.step()
        assert differences(reference.state(), trainer.state()) == []
        assert (
            diverged or between is by_numpy
        )  # of which nothing small is spared: all has a part in what numpy is given
        assert any(diverged) == (between is now_and_then)
        plan = keeper_of(trainer).plan
        assert plan is not None
        assert plan.again_nbytes > 0
    finally:
        penstock.close(trainer.model)


def test_a_sum_that_backward_does_not_look_at_is_held_for_the_product_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_room(monkeypatch, "kept")
    slow_processor(monkeypatch)
    case = case_of(plain)
    trainer = prepared(case, tmp_path / "run", "smallest", activations="auto")
    try:
        trainer.backward(case.losses[0](trainer.model, 0))
        trainer.step()
        plan = keeper_of(trainer).plan
        assert plan is not None
        assert sum(len(each) for each in plan.results.values()) > 0
    finally:
        penstock.close(trainer.model)


def test_a_result_that_is_held_and_changed_afterwards_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain training has no use for it, and does not mind."""
    set_room(monkeypatch, "kept")
    slow_processor(monkeypatch)
    case = case_of(plain, changes_what_is_shown=True)
    trainer, reference = prepared(case, tmp_path / "run", "smallest", activations="auto"), Reference(case)
    try:
        for step in range(case.steps):
            for each in (reference, trainer):
                each.backward(case.losses[0](each.model, step))
                each.step()
        assert differences(reference.state(), trainer.state()) == []
        plan = keeper_of(trainer).plan
        assert plan is not None
        assert sum(len(each) for each in plan.results.values()) > 0
    finally:
        penstock.close(trainer.model)
