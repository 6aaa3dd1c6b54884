"""Activations that are kept, moved and made again: the bits of plain PyTorch, and no byte moved twice."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_rooms import set_room, slow_processor
from torch import Tensor, nn
from torch.nn import functional
from training_cases import CASES, VOCAB
from training_reference import Case, Reference, Streamed, prepared, resident, train
from zoo import differences, token_ids

import penstock
from penstock.runtime.activations import replay
from penstock.runtime.activations.keeper import ActivationKeeper

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # transformers' own
]


def language(model: Any, batch: int) -> Tensor:
    """Next tokens of random text, without a cache of keys and values: layers that are given one do not run again."""
    ids = token_ids(seed=batch, batch=2, length=10, vocab=VOCAB)
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


SHORT = {
    name: replace(
        CASES[name], steps=2, **({"losses": (language,)} if name in ("llama", "gpt2", "t5", "mixtral") else {})
    )
    for name in ("llama", "gpt2", "t5", "mixtral", "u-net", "perceptron")
}
WAYS = [
    ("keep", "", "smallest"),
    ("recompute", "", "emulated"),
    ("offload", "disk", "smallest"),
    ("offload", "disk", "emulated"),
    ("offload", "host", "emulated"),
    ("auto", "mixed", "smallest"),
    ("auto", "mixed", "emulated"),
]


class Block(nn.Module):
    """Norms that change buffers and one that depends on them, dropout, changes in place, in one segment."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 24, 1)
        self.narrow = nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu_()
        y = functional.dropout(y, 0.3, training=self.training)
        gate, value = self.wide(y).chunk(2, dim=1)
        mixed = torch.sigmoid(gate) * value
        mixed.add_(0.25)
        return x + functional.dropout(self.narrow(mixed), 0.1, training=self.training)


class Pictures(nn.Module):
    """Blocks in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def restore(model: Any, batch: int) -> Tensor:
    """A picture from itself."""
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
    return functional.mse_loss(model(x), x)


SHORT["pictures"] = Case(
    name="pictures",
    make=Pictures,
    losses=(restore,),
    optimizer=penstock.AdamW(lr=5e-3, max_grad_norm=0.5),
    batches=2,
    steps=2,
)


def penalised(model: Any, batch: int) -> Tensor:
    """Next tokens of random text, and how steeply the loss depends on embeddings and on some weights: backward has a
    graph of its own, and passes through the weights once more."""
    ids = token_ids(seed=batch, batch=2, length=10, vocab=VOCAB)
    inputs = torch.randn(2, 10, model.config.hidden_size, generator=torch.Generator().manual_seed(batch))
    inputs.requires_grad_(True)
    loss: Tensor = model(inputs_embeds=inputs, labels=ids, use_cache=False).loss
    layer = model.model.layers[1]
    steep = torch.autograd.grad(
        loss, [inputs, layer.mlp.up_proj.weight, layer.self_attn.q_proj.weight], create_graph=True
    )
    return loss + sum((each.square().sum() for each in steep), torch.zeros(()))


def plain_attention() -> Any:
    """torch's fused kernels have no second derivative."""
    model: Any = CASES["llama"].make()
    model.set_attn_implementation("eager")
    return model


SHORT["penalised"] = Case(
    name="penalised",
    make=plain_attention,
    losses=(penalised,),
    optimizer=penstock.AdamW(lr=5e-3),
    steps=3,
)


@pytest.mark.parametrize(
    ("name", "activations", "room", "placement"),
    [
        *((name, *way) for name in ("penalised", "llama", "gpt2", "t5", "u-net", "pictures") for way in WAYS),
        *((name, *way) for name in ("perceptron", "mixtral") for way in WAYS[-2:]),
    ],
)
def test_losses_and_weights_have_the_bits_of_plain_training(
    name: str, activations: str, room: str, placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if room:
        set_room(monkeypatch, room)
        slow_processor(monkeypatch)
    expected, left = resident(SHORT[name])
    actual, state = train(SHORT[name], tmp_path / "run", placement, activations=activations)
    assert differences(expected.outputs(), actual.outputs()) == []
    assert differences(dict(left), state) == []


def keeper_of(trainer: Streamed) -> ActivationKeeper:
    found: ActivationKeeper = trainer.model.penstock.machinery.session.saved.keeper
    return found


def steps(trainer: Reference | Streamed, case: Case, count: int) -> list[Tensor]:
    found = []
    for step in range(count):
        loss = case.losses[0](trainer.model, step)
        trainer.backward(loss)
        trainer.step()
        found.append(loss.detach())
    return found


@pytest.mark.parametrize(("room", "placement"), [("disk", "smallest"), ("mixed", "emulated"), ("host", "emulated")])
def test_each_storage_moves_once_each_way_and_none_on_demand(
    room: str, placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_room(monkeypatch, room)
    case = replace(SHORT["llama"], batches=1)
    trainer = prepared(case, tmp_path / "run", placement, activations="offload")
    try:
        steps(trainer, case, 2)
        store = keeper_of(trainer).store
        sent, leaves = [], []
        plain = store.send

        def noted(storage: Any, parts: Any, *, label: str) -> Any:
            hold = plain(storage, parts, label=label)
            if hold is not None:
                sent.append(hold.nbytes)
                leaves.append(sum(part.nbytes for part in parts if part.place != "keep"))
            return hold

        monkeypatch.setattr(store, "send", noted)
        before = store.statistics()
        steps(trainer, case, 1)
        after = store.statistics()
        assert sum(sent) == distinct_nbytes(case, case.build())
        assert after.out_nbytes - before.out_nbytes <= sum(leaves)
        assert after.in_nbytes - before.in_nbytes <= after.out_nbytes - before.out_nbytes
        assert after.in_nbytes > before.in_nbytes
        assert after.on_demand == before.on_demand
        gc.collect()
        end = store.statistics()
        assert (end.host_nbytes, end.file_nbytes) == (0, 0)
    finally:
        penstock.close(trainer.model)


def distinct_nbytes(case: Case, model: Any) -> int:
    """Bytes of the storages of a page or more that autograd saves, each once, without weights."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.nbytes() >= 4096:
            found[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.losses[0](model, 0)
    return sum(each.untyped_storage().nbytes() for each in found.values())


def test_memory_is_free_once_storages_have_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that layers saved, what is still there is what backward begins with."""
    set_room(monkeypatch, "disk")
    case = replace(SHORT["llama"], batches=1)
    trainer = prepared(case, tmp_path / "run", "smallest", activations="offload")
    try:
        steps(trainer, case, 1)
        store = keeper_of(trainer).store
        seen: list[weakref.ref[Any]] = []
        plain = store.send

        def noted(storage: Any, parts: Any, *, label: str) -> Any:
            seen.append(weakref.ref(storage))
            return plain(storage, parts, label=label)

        monkeypatch.setattr(store, "send", noted)
        loss = case.losses[0](trainer.model, 0)
        with store.changed:
            assert store.changed.wait_for(lambda: not store.leaving_nbytes, timeout=20)
        gc.collect()
        there = sum(each.nbytes() for reference in seen if (each := reference()) is not None)
        every = distinct_nbytes(case, case.build())
        assert there < every / 2
        loss.backward()
    finally:
        penstock.close(trainer.model)


@pytest.fixture
def skipped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many operations each second forward did not carry out."""
    found: list[int] = []
    plain = replay.Replay.__exit__

    def noted(self: Any, *error: Any) -> Any:
        found.append(self.skipped)
        return plain(self, *error)

    monkeypatch.setattr(replay.Replay, "__exit__", noted)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "pictures"])
def test_operations_whose_results_are_held_are_not_carried_out_again(
    name: str, skipped: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_room(monkeypatch, "mixed")
    slow_processor(monkeypatch)
    case = SHORT[name]
    trainer = prepared(case, tmp_path / "run", "smallest", activations="auto")
    try:
        store_without_disk(trainer)
        reference = Reference(case)
        torch.manual_seed(3)
        expected = steps(reference, case, 3)
        torch.manual_seed(3)
        assert all(map(torch.equal, expected, steps(trainer, case, 3)))
        assert skipped
        assert max(skipped) > 0
        plan = keeper_of(trainer).plan
        assert plan is not None
        assert 0 < plan.placement.nbytes_at("keep") <= 20 << 10
    finally:
        penstock.close(trainer.model)


def store_without_disk(trainer: Streamed) -> None:
    """Leave only what is kept to the plan, so that most is made again."""
    keeper = keeper_of(trainer)
    tiers = [tier for tier in keeper.machine.tiers if tier.place == "keep"]
    keeper.machine = replace(keeper.machine, tiers=tiers)


def test_a_plan_is_made_for_larger_inputs_and_not_for_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_room(monkeypatch, "mixed")
    slow_processor(monkeypatch)
    case = SHORT["llama"]
    trainer, reference = prepared(case, tmp_path / "run", "smallest", activations="auto"), Reference(case)

    def loss(model: Any, length: int) -> Tensor:
        ids = torch.randint(0, 128, (2, length), generator=torch.Generator().manual_seed(length))
        found: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    plans = []
    try:
        for length in (8, 8, 20, 20, 20, 6, 12):
            losses = []
            for each in (reference, trainer):
                losses.append(loss(each.model, length))
                each.backward(losses[-1])
                each.step()
            assert torch.equal(*losses)
            plans.append(keeper_of(trainer).plan)
        assert plans[0] is plans[1] is plans[2]
        assert plans[3] is not plans[2]  # the forward in which they were larger made the next one show what there is
        assert plans[3] is plans[4] is plans[5] is plans[6]
        assert differences(reference.state(), trainer.state()) == []
    finally:
        penstock.close(trainer.model)


@pytest.mark.parametrize(("activations", "room"), [("offload", "mixed"), ("auto", "mixed"), ("offload", "host")])
def test_several_forwards_before_a_backward(
    activations: str, room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the plan had room for: what has none is made again, or goes to disk."""
    set_room(monkeypatch, room)
    slow_processor(monkeypatch)
    case = replace(SHORT["gpt2"], batches=3)
    trainer, reference = prepared(case, tmp_path / "run", "emulated", activations=activations), Reference(case)
    try:
        for step in range(3):
            found = []
            for each in (reference, trainer):
                torch.manual_seed(step)
                losses = [case.losses[0](each.model, batch) for batch in range(3)]
                for loss in (losses[1], losses[2], losses[0]):
                    each.backward(loss)
                found.append(torch.stack(losses).detach())
                each.step()
            assert torch.equal(*found)
        assert differences(reference.state(), trainer.state()) == []
    finally:
        penstock.close(trainer.model)


@pytest.mark.parametrize("activations", ["offload", "auto"])
def test_one_graph_may_be_gone_through_twice(activations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_room(monkeypatch, "mixed")
    slow_processor(monkeypatch)
    case = replace(SHORT["pictures"], batches=2)
    trainer, reference = prepared(case, tmp_path / "run", "smallest", activations=activations), Reference(case)
    try:
        for step in range(3):
            for each in (reference, trainer):
                torch.manual_seed(step)
                loss = restore(each.model, step)
                each.backward(loss, retain_graph=True)
                each.backward(loss)
                each.step()
        assert differences(reference.state(), trainer.state()) == []
    finally:
        penstock.close(trainer.model)


@pytest.mark.parametrize("activations", ["offload", "auto"])
def test_autocast(activations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_room(monkeypatch, "mixed")
    slow_processor(monkeypatch)
    case = replace(SHORT["gpt2"], batches=1)
    trainer, reference = prepared(case, tmp_path / "run", "smallest", activations=activations), Reference(case)
    try:
        for step in range(3):
            found = []
            for each in (reference, trainer):
                torch.manual_seed(step)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = case.losses[0](each.model, step)
                each.backward(loss)
                each.step()
                found.append(loss.detach())
            assert torch.equal(*found)
        assert differences(reference.state(), trainer.state()) == []
    finally:
        penstock.close(trainer.model)


class Spoiler(nn.Module):
    """Changes in place what an operation has saved."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).exp()
        x.mul_(2)
        return x


def test_a_change_in_place_of_what_was_saved_is_an_error_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_room(monkeypatch, "disk")
    case = Case(
        name="spoiler",
        make=Spoiler,
        losses=(lambda model, batch: model(torch.full((64, 64), 0.01)).sum(),),
        optimizer=penstock.AdamW(),
    )
    trainer = prepared(case, tmp_path / "run", "smallest", activations="offload")
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                case.losses[0](trainer.model, 0).backward()
    finally:
        penstock.close(trainer.model)


def notes(model: Any) -> str:
    return " ".join(str(penstock.explain(model)).split())


def test_the_plan_says_where_they_go_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_room(monkeypatch, "mixed")
    slow_processor(monkeypatch)
    case = SHORT["llama"]
    trainer = prepared(case, tmp_path / "run", "emulated", activations="auto")
    try:
        assert "activations: layers make theirs again, until a first forward has shown" in notes(trainer.model)
        steps(trainer, case, 1)
        said = notes(trainer.model)
        assert "until a first forward" not in said
        for words in ("activations: of", "stay where they are made", "go to host memory", "a pass is foreseen to take"):
            assert words in said
    finally:
        penstock.close(trainer.model)


def test_the_budget_holds_buffers_and_the_arena(tmp_path: Path) -> None:
    """What is asked for beside the weights is what is made: an arena of that size, and no other."""
    case = SHORT["llama"]
    trainer = prepared(case, tmp_path / "run", "emulated", activations="offload")
    needed = trainer.model.penstock.plan.host_nbytes
    store = keeper_of(trainer).store
    arena = store.arena.nbytes
    penstock.close(trainer.model)
    memory = {"device": trainer.model.penstock.plan.device_budget_nbytes, "host": needed + (8 << 20)}
    model, optimizer = penstock.prepare(
        case.build(), optimizer=case.optimizer, disk=tmp_path / "other", max_memory=memory,
        device="emulated", accumulate=3, activations="offload",
    )  # fmt: skip
    try:
        plan = model.penstock.plan
        larger = keeper_of(Streamed(model, optimizer)).store.arena.nbytes
        assert arena < larger
        assert plan.host_nbytes <= plan.host_budget_nbytes
    finally:
        penstock.close(model)
