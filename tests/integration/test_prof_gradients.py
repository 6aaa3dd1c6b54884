"""Gradients in a recording: counted where they are looked at, and where only their presence is."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from penstock.runtime.profiler.gradients import WholeGradients
from penstock.runtime.profiler.profiler import Profiler
from penstock.runtime.profiler.recorder import Recorder
from penstock.runtime.profiler.ring import Ring
from penstock.runtime.profiler.schema import Category, Compute, Memory, Phase, Tier
from penstock.runtime.profiler.turns import FIRST_STEPS

ACTIONS = ("none", "new", "larger", "share", "look", "pass", "drop")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2)), max_size=40))
def test_bytes_are_those_that_were_there_when_it_was_looked_at(actions: list[tuple[str, int]]) -> None:
    """A look tells what is there; passing by tells only whether there is something, and takes its size on trust."""
    recorder = Recorder(Ring(capacity_nbytes=2**20))
    whole = WholeGradients(recorder, at_once=False)
    owners = [SimpleNamespace(row=row, gradient=None) for row in range(3)]
    gradients: list[torch.Tensor | None] = [None] * 3
    for action, number in actions:
        owner, gradient = owners[number], gradients[number]
        match action:
            case "none":
                gradients[number] = None
            case "new" | "larger":
                gradients[number] = torch.zeros(4 if action == "new" else 16)
            case "share":
                gradients[number] = gradients[(number + 1) % 3]
            case "drop":
                whole.drop(owner)
            case "pass":
                changes: Counter[tuple[Tier, int]] = Counter()
                if not whole.pass_by(owner, gradient is not None, changes):
                    assert gradient is not None
                    assert owner.gradient is None or whole._counted.get(owner.gradient.key) is not owner.gradient
                    whole.hold(owner, gradient)
                for (tier, _), nbytes in changes.items():
                    recorder.memory(nbytes, tier, Category.GRADIENT)
            case "look":
                if gradient is None:
                    whole.drop(owner)
                else:
                    assert whole.hold(owner, gradient)
        counted = {id(o.gradient): o.gradient for o in owners if o.gradient is not None}
        expected = sum(g.nbytes for g in counted.values() if not g.away and whole._counted.get(g.key) is g)
        assert recorder.live[Tier.HOST] == expected
    for _ in range(2):  # one that two parameters had is told anew by the other when the first has lost it
        for owner, gradient in zip(owners, gradients, strict=True):
            if gradient is None:
                whole.drop(owner)
            else:
                assert whole.hold(owner, gradient)
    there = {g.untyped_storage().data_ptr(): g.nbytes for g in gradients if g is not None}
    assert recorder.live[Tier.HOST] == sum(there.values())
    for owner in owners:
        whole.drop(owner)
    assert recorder.live[Tier.HOST] == 0


def test_gradients_come_and_go_in_steps_of_light_that_are_not_looked_at(tmp_path: Path) -> None:
    """At each step's optimizer all of them are there, and none in the forward after `zero_grad`."""
    gc.collect()  # models of other tests have gradients too
    net = nn.Sequential(nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    weights = sum(p.nbytes for p in net.parameters())
    held, looked = [], []
    with Profiler(tmp_path / "run.prof", level="light") as profiler:
        turns = profiler._turns
        turns._share = 0.0  # but for the first, and one in 64

        def note(*_: object) -> None:
            held.append(live(profiler))

        def live(profiler: Profiler) -> int:
            return profiler._recorder.live[Tier.HOST]

        for _ in range(FIRST_STEPS + 5):
            optimizer.zero_grad()
            loss = net(torch.randn(8, 32)).sum()
            looked.append(turns.looking)
            note()
            loss.backward()
            optimizer.step()
            note()
    assert looked == [True] * FIRST_STEPS + [False] * 5
    rows = profiler.profile()[Memory]
    paths = [profiler.profile().module_path(number) for number in rows.module.tolist()]
    own = [path.rpartition(":")[2] in {"0.0", "0.1", "0.2", "0.3"} for path in paths]  # there may be other roots
    gradients = rows.where((rows.category == Category.GRADIENT) & np.array(own))
    without, with_all = held[2::2], held[3::2]  # the first step made them
    assert {after - before for before, after in zip(without, with_all, strict=True)} == {weights}
    assert len(set(without)) == 1
    assert int(gradients.nbytes.sum()) == weights
    spans = profiler.profile()[Compute]
    calls = int((spans.where(spans.phase == Phase.FORWARD).depth == 2).sum())
    assert calls == 4 * FIRST_STEPS, "layers carry no hooks in the other steps"


def test_a_gradient_that_has_grown_unseen_is_counted_at_the_next_look(tmp_path: Path) -> None:
    recorder = Recorder(Ring(capacity_nbytes=2**16))
    whole = WholeGradients(recorder, at_once=False)
    owner = SimpleNamespace(row=0, gradient=None)
    assert whole.hold(owner, torch.zeros(4))
    assert whole.pass_by(owner, False, Counter())
    larger = torch.zeros(64)
    assert whole.pass_by(owner, True, Counter())
    assert whole.hold(owner, larger)
    assert recorder.live[Tier.HOST] == larger.nbytes
