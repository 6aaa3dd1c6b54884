"""Gradients through experts that are blocks of their own, and those of experts themselves: transformers' own, to the
bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_experts import ARCHITECTURES, MOE, entry, loaded
from torch import Tensor
from zoo import load_resident
from zoo.decoders import token_ids

from penstock.runtime.experts.implementation import IMPLEMENTATION

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("every_core")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    return entry("mixtral", *ARCHITECTURES["mixtral"]).save(tmp_path_factory.mktemp("experts") / "mixtral")


def test_gradients_pass_through(folder: Path) -> None:
    expected = load_resident(folder).requires_grad_(False)
    states = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(3))

    def gradient(model: Any) -> Tensor:
        given = states.clone().requires_grad_(True)
        model.model(inputs_embeds=given).last_hidden_state.square().sum().backward()
        assert given.grad is not None
        return given.grad

    with loaded(folder) as model:
        assert torch.equal(gradient(expected), gradient(model))


@pytest.mark.parametrize("other", [IMPLEMENTATION, "grouped_mm", "eager", "batched_mm"])
def test_experts_that_alone_are_trained_have_their_gradients(other: str, folder: Path) -> None:
    """Nothing that comes into the first layer wants one."""
    inputs = {"input_ids": token_ids(batch=2, length=5)}

    def gradients(model: Any) -> dict[str, Tensor | None]:
        experts = {name: each for name, each in model.named_parameters() if ".experts." in name}
        model.requires_grad_(False)
        for each in experts.values():
            each.requires_grad_(True)
        model.model(**inputs).last_hidden_state.square().sum().backward()
        return {name: each.grad for name, each in experts.items()}

    resident = load_resident(folder)
    resident.set_experts_implementation("grouped_mm" if other == IMPLEMENTATION else other)  # type: ignore[operator]
    expected = gradients(resident)
    with loaded(folder) as model:
        model.set_experts_implementation(other)
        found = gradients(model)
    assert len(expected) == 2 * MOE["num_hidden_layers"]
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        assert gradient is not None, name
        if other == "batched_mm":  # torch adds up what it copied of an expert in the order in which threads come
            torch.testing.assert_close(gradient, expected[name])
        else:
            assert torch.equal(gradient, expected[name]), name  # type: ignore[arg-type]
