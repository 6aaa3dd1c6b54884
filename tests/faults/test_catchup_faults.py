"""A drive that fails while an expert catches up: it is told, and the last commit is whole."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from breaking import breaking, fails
from training_reference import PLENTY
from zoo import token_ids
from zoo.decoders import COMMON

import penstock
from penstock.memory.errors import PenstockError

pytestmark = [
    pytest.mark.usefixtures("one_thread", "states_on_disk"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # transformers' own
]


def build() -> torch.nn.Module:
    sizes: dict[str, Any] = {
        **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "num_local_experts": 16, "num_experts_per_tok": 2, "vocab_size": 64},
    }
    torch.manual_seed(1)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **COMMON)).train()


def ids(step: int) -> dict[str, torch.Tensor]:
    found = token_ids(seed=step, batch=1, length=2, vocab=64)
    return {"input_ids": found, "labels": found}


def train(model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        model(**ids(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_read_that_fails_in_a_forward_is_told_there(tmp_path: Path) -> None:
    model, optimizer = penstock.prepare(
        build(), optimizer=penstock.AdamW(lr=1e-2), disk=tmp_path / "run", max_memory={"host": PLENTY}, device="cpu"
    )
    try:
        train(model, optimizer, range(3))
        penstock.save(model, optimizer).wait()
        committed = {name: value.clone() for name, value in model.state_dict().items()}
        train(model, optimizer, range(3, 6))
        optimizer.training._updater.wait()
        catch_up = optimizer.training.catch_up
        assert catch_up.statistics().waiting > 0
        made = catch_up.statistics().made

        def look() -> None:
            with torch.no_grad():
                for step in range(6, 60):  # until one of them wants an expert that is behind
                    model(**ids(step))

        with breaking("preadv", "blocks.data", fails(errno.EIO)) as broken:
            with pytest.raises(PenstockError, match=r"blocks\.data"):
                look()
            assert broken
        assert catch_up.statistics().made > made
        with pytest.raises(PenstockError, match="resume"):
            model(**ids(0))
        with pytest.raises(PenstockError):
            optimizer.step()
    finally:
        penstock.close(model)
    model, optimizer = penstock.resume(tmp_path / "run", model=build(), max_memory={"host": PLENTY}, device="cpu")
    try:
        assert all(torch.equal(value, committed[name]) for name, value in model.state_dict().items())
        train(model, optimizer, range(3, 5))
    finally:
        penstock.close(model)
