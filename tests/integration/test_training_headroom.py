"""What an automatic budget leaves free for a training step, and what it decides about activations by it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from zoo import token_ids
from zoo.finetune import write_checkpoint, write_rows

import penstock
from penstock import trainedmodel
from penstock.cli import main
from penstock.runtime import tiers
from penstock.runtime.activations.store import LEAVING
from penstock.runtime.devices.cpu import CpuDevice
from penstock.runtime.headroom import FRAMEWORK
from penstock.runtime.layout import Changing
from penstock.runtime.tiers import Wanted
from penstock.runtime.training.headroom import StepRoom, step_room
from penstock.runtime.training.savedcount import forward_saves

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # transformers' own
]
CONTEXT, BATCH = 96, 3
NOTHING = Changing(own_nbytes=0, block_nbytes=0)


@dataclass(frozen=True)
class Capacity:
    available_nbytes: int
    obtainable_nbytes: int = 2**36


@pytest.fixture
def capacity(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says how much memory the machine has."""

    def set_to(nbytes: int) -> None:
        monkeypatch.setattr(tiers, "host_capacity", lambda: Capacity(nbytes))

    return set_to


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), layers=3)


def room(model: Any, activations: Any = "auto", *, context: int = CONTEXT, batch: int = BATCH) -> StepRoom:
    device = CpuDevice()
    try:
        return step_room(
            model,
            NOTHING,
            wanted=Wanted(host=None, device=None),
            device=device,
            activations=activations,
            context=context,
            batch=batch,
            saves=forward_saves(model, context=context, batch=batch),
        )
    finally:
        device.close()


def kept_by_a_plain_forward(model: nn.Module, context: int, batch: int) -> tuple[int, int]:
    """Bytes that autograd keeps, and of the logits."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor
        return tensor

    ids = token_ids(seed=0, batch=batch, length=context, vocab=200)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(input_ids=ids, labels=ids, use_cache=False)
    return sum(each.untyped_storage().nbytes() for each in kept.values()), 4 * output.logits.numel()


def test_it_is_what_a_step_keeps_and_its_logits(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    for context, batch in ((CONTEXT, BATCH), (200, 4)):
        kept, logits = kept_by_a_plain_forward(model, context, batch)
        keep = room(model, "keep", context=context, batch=batch).headroom_nbytes - FRAMEWORK
        assert kept + logits <= keep <= 1.5 * kept + 4 * logits
        again = room(model, "recompute", context=context, batch=batch).headroom_nbytes - FRAMEWORK
        assert 2 * logits <= again < keep / 2
    assert model.training
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_activations_are_kept_where_everything_fits_beside_them(checkpoint: Path, capacity: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    kept, again = (room(model, kind).headroom_nbytes for kind in ("keep", "recompute"))
    capacity(weights + kept)
    assert room(model) == StepRoom(headroom_nbytes=kept, activations="keep", known=True)
    capacity(weights + kept - 1)
    saves = forward_saves(model, context=CONTEXT, batch=BATCH)
    assert saves is not None
    moved = LEAVING + saves.layers[0].saved_nbytes  # on its way out, and back before its use
    found = StepRoom(headroom_nbytes=again + moved, activations="auto", known=True)
    assert room(model) == found  # which a plan decides about
    assert room(model, "offload") == replace(found, activations="offload")


@pytest.mark.parametrize("built", [False, True])
def test_prepare_leaves_that_room_in_automatic_budgets(
    built: bool, checkpoint: Path, tmp_path: Path, capacity: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    again, longer = (room(model, "recompute", context=context).headroom_nbytes for context in (CONTEXT, 250))
    assert longer > again
    options: dict[str, Any] = {"device": "cpu", "batch": BATCH, "activations": "recompute"}
    for number, (context, headroom) in enumerate(((CONTEXT, again), (250, longer))):
        capacity(headroom + 2**25)
        folder = tmp_path / str(number)
        given = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto") if built else checkpoint
        made, optimizer = penstock.prepare(given, optimizer=penstock.AdamW(), disk=folder, context=context, **options)
        try:
            assert made.penstock.plan.host_budget_nbytes == 2**25
            assert optimizer._settings.activations == "recompute"
            penstock.save(made, optimizer).wait()
        finally:
            penstock.close(made)
        capacity(headroom + 2**26)
        given = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto") if built else None
        made, optimizer = penstock.resume(folder, model=given, context=context, **options)
        penstock.close(made)
        assert made.penstock.plan.host_budget_nbytes == 2**26


def test_a_named_budget_is_taken_as_it_is(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> StepRoom:
        raise AssertionError

    monkeypatch.setattr(trainedmodel, "step_room", never)
    options: dict[str, Any] = {"optimizer": penstock.AdamW(), "device": "cpu", "max_memory": {"host": "64MiB"}}
    made, optimizer = penstock.prepare(checkpoint, disk=tmp_path / "run", **options)
    penstock.close(made)
    assert optimizer._settings.activations == "auto"


def test_finetune_says_how_long_its_sequences_are(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, Any]] = []

    def noted(*args: Any, **options: Any) -> StepRoom:
        asked.append((options["context"], options["batch"]))
        return step_room(*args, **options)

    monkeypatch.setattr(trainedmodel, "step_room", noted)
    rows = write_rows(tmp_path / "zen.jsonl")
    command = ["finetune", str(checkpoint), "--data", str(rows), "--out", str(tmp_path / "run"), "--device", "cpu"]
    command += ["--seq", "24", "--batch", "5", "--steps"]
    assert main([*command, "1", "--schedule", "constant"]) == 0
    assert main([*command, "2", "--schedule", "constant", "--resume"]) == 0
    assert asked == [(24, 5), (24, 5)]


def test_of_other_modules_it_is_said_that_nothing_is_known(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert room(nn.Linear(3, 3)) == StepRoom(headroom_nbytes=FRAMEWORK, activations="keep", known=False)
    assert "a Linear" in caplog.text
    assert "max_memory" in caplog.text


def test_positions_that_the_model_has_not(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(penstock.UsageError, match=r"1000.*256 positions"):
        penstock.prepare(checkpoint, optimizer=penstock.AdamW(), disk=tmp_path / "run", device="cpu", context=1000)
