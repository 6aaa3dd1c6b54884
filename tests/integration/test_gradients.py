"""Gradients through an offloaded module, and what would make them wrong; and a resident model in a forked child."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import ZOO
from zoo.budgets import streamed

import penstock


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(8))
        self.way = "plain"

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            around: Any = torch.autograd.graph.save_on_cpu() if self.way == "save_on_cpu" else nullcontext()
            with around:
                x = checkpoint(layer, x, use_reentrant=False) if self.way == "checkpoint" else layer(x)
        return x


def gradient(module: nn.Module) -> Tensor:
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    module(x).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("way", ["save_on_cpu", "checkpoint"])
def test_hooks_that_would_keep_views_of_slots_are_refused(way: str) -> None:
    torch.manual_seed(0)
    module = Stack()
    expected = gradient(module)
    penstock.offload(module, max_memory={"host": "1MiB"}, device="cpu")
    try:
        assert torch.equal(gradient(module), expected)
        module.way = way
        with pytest.raises(penstock.UsageError, match="wrong gradients"):
            gradient(module)
        module.way = "plain"
        assert torch.equal(gradient(module), expected)
    finally:
        penstock.close(module)


def test_a_forked_child_may_run_a_resident_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = penstock.load(tmp_path, max_memory={"host": "64MiB"}, device="cpu")
    assert model.penstock.plan.resident
    name, weight = next(iter(model.named_parameters()))
    expected = weight.detach().clone()
    pid = os.fork()
    if pid == 0:  # nothing that may take a lock: the parent's threads are not here
        os._exit(0 if torch.equal(dict(model.named_parameters())[name], expected) else 3)
    assert os.waitpid(pid, 0)[1] == 0
    penstock.close(model)


def test_the_order_of_backward_is_learned(tmp_path: Path) -> None:
    """From the third step on every use is foreseen, and nothing is brought for nothing."""
    folder = ZOO["llama"].save(tmp_path / "checkpoint")

    def place(budget: dict[str, int], device: str) -> Any:
        return penstock.load(folder, max_memory=budget, device=device)

    with streamed(place, level="half") as model:
        found = []
        for _ in range(6):
            embedded = torch.randn(1, 8, model.config.hidden_size, requires_grad=True)
            model(inputs_embeds=embedded, use_cache=False).logits.float().sum().backward()
            found.append(model.penstock.statistics().executor)
    assert found[5].orders.mismatched == found[2].orders.mismatched
    assert found[5].orders.matched > found[2].orders.matched
    assert found[5].wasted == found[2].wasted
