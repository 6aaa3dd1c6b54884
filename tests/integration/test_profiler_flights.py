"""Tensors that live within a step: what a recording says of them, against sizes that are known and a slow reference."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _python_dispatch

from penstock.runtime.profiler import flights
from penstock.runtime.profiler.profile import Profile
from penstock.runtime.profiler.profiler import Profiler
from penstock.runtime.profiler.schema import Category, Mark, MarkKind, Memory

pytestmark = pytest.mark.usefixtures("alone")

ROWS, WIDE = 64, 1024
LARGE = ROWS * WIDE * 4
"""Bytes of a result of the wide layer, and of its gradient."""


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(16, 16)
        self.head = nn.Linear(16, WIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inside(x))


def changes(profile: Profile, category: Category) -> list[tuple[str, int]]:
    """Path and bytes of the records of a category that are at least as large as a result of the wide layer."""
    rows = profile[Memory]
    rows = rows.where((rows.category == category) & (abs(rows.nbytes) >= LARGE))
    return [(profile.module_path(m), n) for m, n in zip(rows.module.tolist(), rows.nbytes.tolist(), strict=True)]


def whole(profile: Profile) -> Profile:
    """The same; nothing has gone wrong in it."""
    assert not (profile[Mark].kind == MarkKind.ERROR).any(), "a hook failed"
    return profile


def test_gradients_of_a_loss_are_counted_while_they_are_there(tmp_path: Path) -> None:
    net, x, wanted = Wide(), torch.randn(ROWS, 16), torch.randint(0, WIDE, (ROWS,))
    with Profiler(tmp_path / "run.prof", level="full") as profiler:
        nn.functional.cross_entropy(net(x), wanted).backward()
    profile = whole(profiler.profile())
    # what the loss makes of the logits, then their gradient; each of them is gone again in the end
    taken = [change for change in changes(profile, Category.GRADIENT) if change[1] > 0]
    assert taken == [("(NllLossBackward0)", LARGE), ("(LogSoftmaxBackward0)", LARGE)]
    given = [change for change in changes(profile, Category.GRADIENT) if change[1] < 0]
    assert sorted(given) == sorted((path, -nbytes) for path, nbytes in taken)
    # the logits, which nobody saves, and what the loss saves
    assert [change for change in changes(profile, Category.ACTIVATION) if change[1] > 0] == [
        ("head", LARGE),
        ("", LARGE),
    ]
    assert sum(nbytes for _, nbytes in changes(profile, Category.ACTIVATION)) == 0


def test_gradients_between_modules_are_those_of_the_module_whose_backward_runs(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(16, WIDE), nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 1))
    with Profiler(tmp_path / "run.prof", level="full") as profiler:
        wide(torch.randn(ROWS, 16)).sum().backward()
    rows = changes(whole(profiler.profile()), Category.GRADIENT)
    weight = WIDE * WIDE * 4
    # the gradient of the second one's weight is counted as soon as it is made, and anew once it is accumulated
    assert [row for row in rows if row[1] > 0] == [("2", LARGE), ("1", LARGE), ("1", weight), ("1", weight)]
    assert [row for row in rows if row[1] == -weight] == [("1", -weight)]
    assert max(itertools.accumulate(nbytes for _, nbytes in rows)) <= weight + 2 * LARGE, "never both at once"


class _Sizes(_python_dispatch.TorchDispatchMode):  # type: ignore[misc, unused-ignore]
    """The slow, obvious way: every operation, and the bytes of all storages that are there after it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.made: list[int] = []
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and not any(tensor is arg for arg in args):
                nbytes = tensor.untyped_storage().nbytes()
                views = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
                if nbytes >= LARGE and tensor.untyped_storage().data_ptr() not in views:
                    self.made.append(nbytes)
        return result


@pytest.mark.parametrize("foreach", [False, True])
def test_what_an_optimizer_computes_with_is_counted(tmp_path: Path, foreach: bool) -> None:
    def trained(context: Any) -> torch.Tensor:
        torch.manual_seed(0)
        net = nn.Linear(WIDE, 256, bias=False)
        optimizer = torch.optim.AdamW(net.parameters(), foreach=foreach)
        net(torch.randn(2, WIDE)).sum().backward()
        optimizer.step()  # makes the states
        with context:
            optimizer.step()
        return net.weight.detach()

    sizes = _Sizes()
    expected = trained(sizes)
    profiler = Profiler(tmp_path / "run.prof", level="full")
    assert torch.equal(trained(profiler), expected)
    profile = whole(profiler.profile())
    rows = changes(profile, Category.OPTIMIZER)
    mine = [nbytes for path, nbytes in rows if path == "(optimizer)"]
    assert sizes.made, "the reference has seen temporaries"
    assert sorted(nbytes for nbytes in mine if nbytes > 0) == sorted(sizes.made)
    assert sum(mine) == 0


def test_states_are_counted_once(tmp_path: Path) -> None:
    net = nn.Linear(WIDE, 256, bias=False)
    optimizer = torch.optim.AdamW(net.parameters())
    with Profiler(tmp_path / "run.prof", level="full") as profiler:
        for _ in range(3):
            net(torch.randn(2, WIDE)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    profile = whole(profiler.profile())
    rows = profile[Memory]
    live = {c: int(rows.nbytes[rows.category == c].sum()) for c in (Category.OPTIMIZER, Category.GRADIENT)}
    assert live == {Category.OPTIMIZER: 2 * net.weight.nbytes, Category.GRADIENT: 0}


@pytest.mark.parametrize("level", ["light", "full"])
def test_gradients_that_share_a_storage_are_counted_once(tmp_path: Path, level: Any) -> None:
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.0)

    def live() -> int:
        rows = profiler.profile()[Memory]
        return int(rows.nbytes[rows.category == Category.GRADIENT].sum())

    shared = torch.ones(64, 64)
    with Profiler(tmp_path / "a.prof", level=level) as profiler:
        first.weight.grad = second.weight.grad = shared
        optimizer.step()
    assert live() == shared.nbytes
    with Profiler(tmp_path / "b.prof", level=level) as profiler:
        first.weight.grad = None  # the one that it was counted with has it no more
        optimizer.step()
    assert live() == shared.nbytes
    with Profiler(tmp_path / "c.prof", level=level) as profiler:
        optimizer.step()
        first.weight.grad = torch.ones(64, 64)
        optimizer.step()
        second.weight.grad = first.weight.grad
        optimizer.step()
    assert live() == shared.nbytes


def test_a_gradient_is_given_back_when_it_is_gone(tmp_path: Path) -> None:
    net = nn.Linear(64, 64, bias=False)
    with Profiler(tmp_path / "run.prof", level="full") as profiler:
        net(torch.randn(2, 64)).sum().backward()
        net.zero_grad()
    rows = profiler.profile()[Memory]
    assert rows.nbytes[rows.category == Category.GRADIENT].tolist() == [net.weight.nbytes, -net.weight.nbytes]


def test_hooks_are_gone_after_a_pass_and_a_raising_step_leaves_no_mode(tmp_path: Path) -> None:
    class Raises(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise ValueError("mine")

    run = torch.autograd._engine_run_backward  # type: ignore[attr-defined, unused-ignore]
    net = Wide()
    with Profiler(tmp_path / "run.prof", level="full"):
        loss = net(torch.randn(ROWS, 16)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(ValueError, match="mine"):
            Raises(net.parameters()).step()
    assert torch.autograd._engine_run_backward is run  # type: ignore[attr-defined, unused-ignore]
    assert not _python_dispatch._get_current_dispatch_mode_stack()


def test_after_some_steps_looking_takes_a_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.runtime.profiler.recorder import Recorder
    from penstock.runtime.profiler.ring import Ring
    from penstock.runtime.profiler.turns import StepTurns

    now = [0]
    recorder = Recorder(Ring(capacity_nbytes=2**16), clock=lambda: now[0])
    looked = []
    turns = StepTurns()
    with flights.Flights(recorder, lambda key: False, turns) as watch:
        for number in range(12):
            turns.looking = number != 8
            recorder.begin_step("train")
            looked.append(watch.looking)
            now[0] += 1000
            if watch.looking:
                watch.spent_ns += 15
    # after three steps 45 are spent, which is the share of 4500; the ninth is one that nobody looks at
    assert looked == [True, True, True, False, False, True, True, False, False, True, True, True]
