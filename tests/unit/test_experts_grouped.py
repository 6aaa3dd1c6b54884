"""Experts one by one against transformers' own product of all of them, to the bit; and which modules are found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward, use_experts_implementation

from penstock.runtime.experts.grouped import Grouped, compute_together
from penstock.runtime.experts.layers import find_expert_layers
from penstock.runtime.experts.steps import step_of
from penstock.scheduler.experts.shape import Routing

HIDDEN, FFN = 24, 40


def bank(experts: int, *, gate: bool = True, bias: bool = False, transposed: bool = False, act: Any = None) -> Any:
    """A module of experts as transformers' models define them, of any of the layouts that there are."""

    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = experts
            first = (HIDDEN, (1 + gate) * FFN)
            second = (FFN, HIDDEN)
            name = "gate_up_proj" if gate else "up_proj"
            for key, shape in ((name, first), ("down_proj", second)):
                self.register_parameter(key, parameter(experts, *(shape if transposed else shape[::-1])))
                if bias:
                    self.register_parameter(f"{key}_bias", parameter(experts, shape[1]))
            self.act_fn = act or nn.functional.silu

        def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    wrap: Any = use_experts_implementation
    made = wrap(Experts, has_gate=gate, has_bias=bias, is_transposed=transposed)
    return made(SimpleNamespace(_experts_implementation="grouped_mm", num_experts_per_tok=2))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 4, requires_grad=False)


def one_by_one(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    lent: list[tuple[int, int]] = []

    @contextmanager
    def lend(part: int, expert: int) -> Iterator[torch.Tensor]:
        lent.append((part, expert))
        yield getattr(module, names[part])[expert]

    order = chosen.unique().flip(0).tolist()  # any order will do
    calls = [Grouped(hidden, chosen, weights, module.num_experts)]
    (found,) = compute_together(calls, module, order, lend)
    assert lent == [(part, expert) for part in (0, 1) for expert in order]
    return found


def routed(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    return torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])


@pytest.mark.usefixtures("every_core")
@given(
    tokens=st.integers(1, 60),
    experts=st.integers(2, 12),
    top_k=st.integers(1, 12),
    gate=st.booleans(),
    bias=st.booleans(),
    transposed=st.booleans(),
    act=st.sampled_from([nn.functional.silu, nn.functional.gelu, nn.functional.relu]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_experts_one_by_one_have_the_bits_of_all_at_once(
    tokens: int,
    experts: int,
    top_k: int,
    gate: bool,
    bias: bool,
    transposed: bool,
    act: Any,
    dtype: torch.dtype,
    seed: int,
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = bank(experts, gate=gate, bias=bias, transposed=transposed, act=act).to(dtype)
        chosen = routed(tokens, experts, min(top_k, experts))
        hidden = torch.randn(tokens, HIDDEN).to(dtype)
        weights = torch.rand(chosen.shape).to(dtype)
    expected = grouped_mm_experts_forward(module, hidden, chosen, weights)
    assert torch.equal(one_by_one(module, hidden, chosen, weights), expected)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 512, 10), (7, 4, 4), (300, 512, 2), (2000, 6, 2)])
def test_many_experts_all_of_them_and_many_tokens(tokens: int, experts: int, top_k: int, every_core: None) -> None:
    module = bank(experts, act=nn.functional.gelu)
    chosen, hidden = routed(tokens, experts, top_k), torch.randn(tokens, HIDDEN)
    weights = torch.rand(chosen.shape)
    assert torch.equal(
        one_by_one(module, hidden, chosen, weights), grouped_mm_experts_forward(module, hidden, chosen, weights)
    )


def test_one_expert_for_all_tokens() -> None:
    module = bank(5)
    chosen, hidden = torch.full((9, 1), 3), torch.randn(9, HIDDEN)
    weights = torch.rand(chosen.shape)
    assert torch.equal(
        one_by_one(module, hidden, chosen, weights), grouped_mm_experts_forward(module, hidden, chosen, weights)
    )


def test_an_expert_that_is_not_there_is_an_error() -> None:
    with pytest.raises(IndexError, match="expert 5 of 5"):
        Grouped(torch.randn(1, HIDDEN), torch.tensor([[5]]), torch.ones(1, 1), 5)


def sizes(module: nn.Module) -> dict[str, int]:
    return {name: each.nbytes for name, each in module.named_parameters()}


def test_layers_are_found_in_their_order() -> None:
    module = nn.ModuleDict({"one": bank(4), "other": nn.Linear(2, 2), "two": bank(4)})
    found = find_expert_layers(module, sizes(module))
    assert found is not None
    assert found.routing == Routing(layers=2, experts=4, top_k=2)
    assert [layer.parts for layer in found.layers] == [
        ("one.gate_up_proj", "one.down_proj"),
        ("two.gate_up_proj", "two.down_proj"),
    ]


def test_without_a_gate_and_with_biases_only_products_are_cut() -> None:
    module = nn.ModuleDict({"one": bank(4, gate=False, bias=True)})
    found = find_expert_layers(module, sizes(module))
    assert found is not None
    assert found.names == {"one.up_proj", "one.down_proj"}


def test_what_is_not_alike_or_not_known_is_left_together() -> None:
    def of(**modules: Any) -> Any:
        return find_expert_layers(nn.ModuleDict(modules), sizes(nn.ModuleDict(modules)))

    assert of(one=nn.Linear(2, 2)) is None
    assert of(one=bank(4), two=bank(5)) is None
    assert of(one=bank(4), two=bank(4, gate=False)) is None
    eager, lone, tied, other = bank(4), bank(4), bank(4), bank(4)
    eager.config._experts_implementation = "eager"
    assert of(one=eager) is None
    lone.config.num_experts_per_tok = None
    assert of(one=lone) is None
    other.down_proj = tied.down_proj
    assert of(one=tied, two=other) is None
    streamed = nn.ModuleDict({"one": bank(4)})
    assert find_expert_layers(streamed, {"one.down_proj": 1}) is None


def test_prompts_and_tokens_are_told_apart() -> None:
    routing = Routing(layers=2, experts=8, top_k=2)
    step = step_of(3, (), {"input_ids": torch.zeros(2, 7, dtype=torch.long), "attention_mask": torch.ones(2, 9)})
    assert (step.number, step.sequences) == (3, 2)
    assert step.phase(14, routing) == "prefill"
    assert step.phase(2, routing) == "decode"
    assert step_of(0, (torch.zeros(5, 1, 4),), {}).sequences == 5
    unknown = step_of(0, (), {"states": None})
    assert (unknown.sequences, unknown.phase(4, routing), unknown.phase(5, routing)) == (None, "decode", "prefill")
