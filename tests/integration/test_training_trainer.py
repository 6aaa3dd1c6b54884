"""transformers' Trainer drives a streamed model as it drives any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR
from training_cases import CASES, VOCAB
from training_reference import Reference, Streamed, find_placement
from zoo import differences, token_ids

import penstock

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),  # transformers' own
]
CASE = CASES["tied"]
STEPS = 4


def _rows() -> list[dict[str, torch.Tensor]]:
    ids = token_ids(seed=2, batch=2 * STEPS, length=10, vocab=VOCAB)
    return [{"input_ids": row, "labels": row} for row in ids]


def _arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(**{**options, **changes})


def _decline(optimizer: Any) -> Any:
    return LambdaLR(optimizer, lambda step: 1 / (step + 1))


class _Loop(transformers.Trainer):
    """In the order of the data and with the model's own mean, so that there is something to compare with."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
        loss: torch.Tensor = model(**inputs).loss
        return loss


def _prepared(folder: Path) -> Streamed:
    device, memory = find_placement(CASE, folder, "smallest")
    return Streamed(
        *penstock.prepare(CASE.build(), optimizer=CASE.optimizer, disk=folder, max_memory=memory, device=device)
    )


@pytest.mark.parametrize("max_norm", [None, 0.0, 0.05])
def test_the_trainer_takes_a_streamed_model_and_its_optimizer(max_norm: float | None, tmp_path: Path) -> None:
    """By default it clips gradients to a norm of 1 itself."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate, which is not installed")
    reference = Reference(CASE)
    schedule, losses, norms = _decline(reference.optimizer), [], []
    for step in range(STEPS):
        rows = torch.stack([row["input_ids"] for row in _rows()[2 * step : 2 * step + 2]])
        loss = reference.model(input_ids=rows, labels=rows).loss
        losses.append(loss.item())
        loss.backward()
        clip = 1.0 if max_norm is None else max_norm or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(reference.parameters.values(), clip).item())
        reference.backward(torch.zeros((), requires_grad=True))  # takes what is there
        reference.step()
        schedule.step()
    assert max(norms) > 1, "or the default would clip nothing"
    trainer = _prepared(tmp_path / "run")
    try:
        changes = {} if max_norm is None else {"max_grad_norm": max_norm}
        loop = _Loop(
            model=trainer.model,
            args=_arguments(tmp_path / "out", **changes),
            train_dataset=_rows(),
            optimizers=(trainer.optimizer, _decline(trainer.optimizer)),
        )
        loop.train()
        logged = [entry for entry in loop.state.log_history if "loss" in entry]
        assert [entry["loss"] for entry in logged] == pytest.approx(losses, abs=1e-2)
        assert [entry["grad_norm"] for entry in logged] == norms
        assert differences(reference.state(), trainer.state()) == []
        loop.save_model(str(tmp_path / "saved"))
    finally:
        penstock.close(trainer.model)
    again = type(reference.model).from_pretrained(tmp_path / "saved")
    assert differences(dict(reference.model.state_dict()), dict(again.state_dict())) == []
