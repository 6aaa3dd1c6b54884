"""The bench of policies asks each question in the same context."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.kv_accuracy import answers
from penstock.scheduler.kv.choice import PolicyChoice


@pytest.mark.parametrize(("name", "times"), [("exact", 1), ("quest", 1), ("snapkv", 1), ("h2o", 3), ("alisa", 3)])
def test_policies_that_remember_questions_get_the_context_anew(name: str, times: int) -> None:
    done: list[str] = []

    def model(*, input_ids: torch.Tensor, **_: Any) -> Any:
        done.append("context" if input_ids.shape[1] > 1 else "question")
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 5))

    cache = SimpleNamespace(
        choice=PolicyChoice(name=name),
        crop=lambda count: done.append("crop"),
        reset=lambda: done.append("reset"),
        statistics=lambda: SimpleNamespace(chosen=None),
    )
    asked = torch.ones(2, 3, dtype=torch.long)
    right, _ = answers(model, torch.ones(2, 8, dtype=torch.long), asked, torch.tensor([[0, 1, 0], [0, 0, 2]]), cache)
    assert right == 4 / 6
    asking = ["question", "crop"]
    beginning = ["reset", "context"]
    assert done == ((beginning + asking) * 3 if times == 3 else beginning + asking * 3)
