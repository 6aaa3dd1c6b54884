"""Experts in training: which masters and states move, of experts that are modules and of those that lie in one tensor;
bit-equal to the plain reference, and so to torch's own optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from training_cases import TEXT, few_tokens
from training_reference import Case, prepared, resident, run, train
from zoo import differences
from zoo.decoders import COMMON

import penstock
from penstock.runtime.training import room, selection
from penstock.runtime.training.updater import Updater

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # transformers' own
]

WIDTH, STEPS = 64, 4
CHOSEN = (0, 1, 0, 2)
"""The expert of each step; there is one more."""


class Switch(nn.Module):
    """Experts that are modules of their own, of which one computes a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        found: Tensor = self.head(self.experts[expert](x).tanh())
        return found


def one_expert(model: Any, batch: int) -> Tensor:
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(batch))
    loss: Tensor = model(x, CHOSEN[batch]).square().mean()
    return loss


MODULES = Case(
    name="experts that are modules",
    make=Switch,
    losses=(one_expert,),
    optimizer=penstock.AdamW(lr=1e-2, weight_decay=0.1),
    steps=STEPS,
)


def gpt_oss() -> nn.Module:
    sizes: dict[str, Any] = {
        **{"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 6},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
    }
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**TEXT, **sizes, **COMMON))


FUSED = Case(
    name="experts in one tensor, transposed, with biases",
    make=gpt_oss,
    losses=(few_tokens,),
    optimizer=penstock.AdamW(lr=1e-2, weight_decay=0.1),
    steps=STEPS,
)


def test_masters_and_states_of_experts_that_are_modules_move_where_they_had_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in (room, selection):
        monkeypatch.setattr(user, "ELEMENTS", WIDTH * WIDTH)  # a shard for each of them
    moved: list[set[int]] = []
    submit = Updater.submit

    def noted(self: Updater, step: Any, blocks: Iterable[int], **options: Any) -> None:
        blocks = list(blocks)
        shards = [shard for block in blocks for shard in self._shards[block]]
        pieces = [piece for shard in shards for piece in shard.pieces]
        moved[-1] |= {each.parameter for each in pieces if step.gradients[each.parameter] is not None}
        assert all(len(shard.pieces) == 1 for shard in shards)  # or an expert would move with another one
        submit(self, step, blocks, **options)

    monkeypatch.setattr(Updater, "submit", noted)
    expected, left = resident(MODULES)
    trainer = prepared(MODULES, tmp_path / "run", "smallest")
    trained = [each.name for each in trainer.optimizer.training.trained]
    try:
        for step in range(STEPS):
            moved.append(set())
            run(MODULES, trainer, None, range(step, step + 1), type(expected)())
            assert {trained[each] for each in moved[-1]} == {f"experts.{CHOSEN[step]}.weight", "head.weight"}
        assert differences(dict(left), trainer.state()) == []
    finally:
        penstock.close(trainer.model)
    assert "step experts.3.weight" not in left  # and so torch does not let it decay either


def test_an_expert_of_one_tensor_decays_without_tokens_and_its_averages_go_on(tmp_path: Path) -> None:
    expected, left = resident(FUSED)
    actual, state = train(FUSED, tmp_path / "run", "smallest")
    assert differences(expected.outputs(), actual.outputs()) == []
    assert differences(dict(left), state) == []
    begun = dict(FUSED.build().named_parameters())
    idle = 0
    for name, weight in begun.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        averages = state[f"exp_avg {name}"].view(weight.shape)
        for expert in range(len(weight)):
            if not averages[expert].any():  # it never had a token
                idle += 1
                decayed = weight.detach()[expert].clone()
                for _ in range(STEPS):
                    decayed.mul_(1 - 1e-2 * 0.1)
                assert torch.equal(state[f"master {name}"].view(weight.shape)[expert], decayed)
    assert idle > 0
