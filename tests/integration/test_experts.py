"""Experts as blocks of their own: the bits of transformers' own run, few bytes, and what asks for whole layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo import Entry, Outputs, differences, load_resident
from zoo.decoders import LLAMA, greedy, logits, token_ids

import penstock
from penstock.runtime.experts.implementation import IMPLEMENTATION
from penstock.runtime.experts.routers import RouterTap
from penstock.runtime.profiler.metrics import summarise
from penstock.runtime.profiler.profiler import Profiler
from penstock.scheduler.experts import prefetch
from penstock.scheduler.experts.costs import ExpertCosts

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("every_core")]

SLOW_DRIVE = ExpertCosts(cpu_s=lambda rows: 1e-6 * rows, device_s=None, read_s=1e-4)
"""On which reading an expert takes much of a layer's time, and less than what lies between two layers here."""
MOE: dict[str, Any] = {**LLAMA, "num_hidden_layers": 3}
LATENT: dict[str, Any] = {
    **MOE,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 4,
    "topk_group": 2,
}
del LATENT["head_dim"]


def qwen2() -> Any:
    sizes = {**MOE, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 52}
    del sizes["head_dim"]
    return transformers.Qwen2MoeConfig(**sizes, num_experts=6, num_experts_per_tok=2, decoder_sparse_step=1)


def olmoe() -> Any:
    sizes = {**MOE, "intermediate_size": 40}
    del sizes["head_dim"]
    return transformers.OlmoeConfig(**sizes, num_experts=8, num_experts_per_tok=4)


def gpt_oss() -> Any:
    sizes = {**MOE, "intermediate_size": 48, "sliding_window": 6}
    return transformers.GptOssConfig(**sizes, num_local_experts=6, num_experts_per_tok=2)


def mixtral(**changes: Any) -> Any:
    sizes = {**MOE, "intermediate_size": 56, "num_local_experts": 5, "num_experts_per_tok": 2, **changes}
    return transformers.MixtralConfig(**sizes)


def qwen3() -> Any:
    sizes = {**MOE, "moe_intermediate_size": 40, "mlp_only_layers": [1]}
    return transformers.Qwen3MoeConfig(**sizes, num_experts=16, num_experts_per_tok=4)


def entry(name: str, model: Any, config: Any, dtype: torch.dtype = torch.float32) -> Entry:
    return Entry(
        name=name, make=lambda: model(config()), inputs=one_and_more, forward=logits, generate=greedy, dtype=dtype
    )


def one_and_more() -> dict[str, Tensor]:
    return {"input_ids": token_ids(batch=2, length=9)}


ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "mixtral": (transformers.MixtralForCausalLM, mixtral),
    "mixtral-gelu": (transformers.MixtralForCausalLM, lambda: mixtral(hidden_act="gelu")),
    "qwen2-moe": (transformers.Qwen2MoeForCausalLM, qwen2),
    "qwen3-moe": (transformers.Qwen3MoeForCausalLM, qwen3),
    "olmoe": (transformers.OlmoeForCausalLM, olmoe),
    "deepseek-v2": (
        transformers.DeepseekV2ForCausalLM,
        lambda: transformers.DeepseekV2Config(**LATENT, topk_method="group_limited_greedy"),
    ),
    "deepseek-v3": (transformers.DeepseekV3ForCausalLM, lambda: transformers.DeepseekV3Config(**LATENT)),
    "gpt-oss": (transformers.GptOssForCausalLM, gpt_oss),
}


class Shelf:
    """Checkpoints, and what transformers' own load of them answers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._answers: dict[str, Outputs] = {}

    def entry(self, name: str, dtype: torch.dtype) -> Entry:
        return entry(name, *ARCHITECTURES[name], dtype)

    def checkpoint(self, name: str, dtype: torch.dtype = torch.float32) -> Path:
        folder = self.root / f"{name}-{dtype}"
        return folder if folder.exists() else self.entry(name, dtype).save(folder)

    def answers(self, name: str, dtype: torch.dtype = torch.float32) -> Outputs:
        key = f"{name}-{dtype}"
        if key not in self._answers:
            self._answers[key] = run(load_resident(self.checkpoint(name, dtype)))
        return self._answers[key]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("experts"))


def run(model: Any) -> Outputs:
    """Prompts and tokens, of one sequence and of two."""
    found: Outputs = {}
    with torch.no_grad():
        for batch in (1, 2):
            inputs = {"input_ids": token_ids(seed=batch, batch=batch, length=9)}
            found |= {f"{batch} {key}": value for key, value in logits(model, inputs).items()}
            found |= {f"{batch} generated {key}": value for key, value in greedy(model, inputs).items()}
    return found


def limits(folder: Path) -> tuple[int, int]:
    """The least budget, and the one that keeps everything."""
    with pytest.raises(penstock.DoesNotFitError) as caught:
        penstock.load(folder, max_memory={"host": 1}, device="cpu")
    refusal = caught.value
    assert refusal.resident_nbytes is not None
    return refusal.needed_nbytes, refusal.resident_nbytes


@contextmanager
def loaded(folder: Path, part: float = 0.5, **options: Any) -> Iterator[Any]:
    """A model with a budget between the least and all."""
    least, most = limits(folder)
    budget = min(int(least + part * (most - least)), most - 1)
    model = penstock.load(folder, max_memory={"host": budget}, device="cpu", **options)
    try:
        yield model
    finally:
        penstock.close(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_results_are_those_of_transformers_to_the_bit(name: str, part: float, dtype: torch.dtype, shelf: Shelf) -> None:
    with loaded(shelf.checkpoint(name, dtype), part) as model:
        assert model.penstock.plan.expert_passing > 0
        for _ in range(2):
            assert differences(shelf.answers(name, dtype), run(model)) == []
        counted = model.penstock.statistics().experts
        assert counted.decode.uses > 0
        assert counted.prefill.uses > 0
        assert counted.cache.held <= counted.capacity
        assert (counted.decode.hit_rate > 0) is (counted.capacity > 0)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_activations_of_many_odd_rows_have_the_same_bits(act: str, tmp_path: Path) -> None:
    """Where threads cut the rows of all experts, elementwise functions round otherwise than on those of one."""
    made = entry("odd", transformers.MixtralForCausalLM, lambda: mixtral(intermediate_size=332, hidden_act=act))
    folder = made.save(tmp_path / "odd")
    inputs = {"input_ids": token_ids(batch=2, length=70)}
    with torch.no_grad(), loaded(folder, 0.3) as model:
        assert differences(logits(load_resident(folder), inputs), logits(model, inputs)) == []


def test_a_token_reads_only_what_the_cache_misses(shelf: Shelf) -> None:
    folder = shelf.checkpoint("qwen3-moe")
    with loaded(folder, 0.6) as model, torch.no_grad():
        plan = model.penstock.plan
        assert {block.home for block in plan.blocks if "experts" not in block.name} == {"host"}
        assert 0 < plan.expert_slots < 32
        ids = token_ids(batch=1, length=6)
        model.generate(input_ids=ids, max_new_tokens=4)  # all else is there from now on
        before = model.penstock.statistics()
        model.generate(input_ids=ids, max_new_tokens=12)
        after = model.penstock.statistics()
        missed = after.experts.decode.read_nbytes - before.experts.decode.read_nbytes
        missed += after.experts.prefill.read_nbytes - before.experts.prefill.read_nbytes
        rows = after.rows_read_nbytes - before.rows_read_nbytes
        assert 0 < after.disk_read_nbytes - before.disk_read_nbytes - rows <= missed


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("other", ["eager", "grouped_mm", "batched_mm"])
def test_another_implementation_gathers_what_it_asks_for(name: str, other: str, shelf: Shelf) -> None:
    expected = load_resident(shelf.checkpoint(name))
    expected.set_experts_implementation(other)  # type: ignore[operator]
    with loaded(shelf.checkpoint(name)) as model:
        model.set_experts_implementation(other)
        assert differences(run(expected), run(model)) == []
        assert model.penstock.statistics().experts.decode.uses == 0
        model.set_experts_implementation(IMPLEMENTATION)
        assert differences(shelf.answers(name), run(model)) == []


def test_weights_can_be_had_and_saved(shelf: Shelf, tmp_path: Path) -> None:
    folder = shelf.checkpoint("olmoe")
    expected = dict(load_resident(folder).state_dict())
    with loaded(folder) as model:
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        with model.penstock.gathered(model.model.layers[1]) as layer:
            weight = layer.mlp.experts.gate_up_proj
            assert torch.equal(weight, expected["model.layers.1.mlp.experts.gate_up_proj"])
        model.save_pretrained(tmp_path / "again")
    assert IMPLEMENTATION not in (tmp_path / "again" / "config.json").read_text()
    first, again = load_resident(folder), load_resident(tmp_path / "again")
    for model in (first, again):  # they lie otherwise in that file; products may round by where operands lie
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    assert differences(run(first), run(again)) == []


def test_a_plan_is_carried_out_as_it_was_made(shelf: Shelf, tmp_path: Path) -> None:
    folder = shelf.checkpoint("qwen3-moe")
    with loaded(folder) as model:
        penstock.save_plan(model.penstock.plan, tmp_path / "plan.json")
        first = model.penstock.plan
    model = penstock.load(folder, plan=tmp_path / "plan.json", max_memory={"host": first.host_nbytes}, device="cpu")
    try:
        second = model.penstock.plan
        assert (second.expert_slots, second.expert_passing) == (first.expert_slots, first.expert_passing)
        assert second.blocks == first.blocks
        assert differences(shelf.answers("qwen3-moe"), run(model)) == []
    finally:
        penstock.close(model)


def test_many_prompts_run_together(shelf: Shelf) -> None:
    folder = shelf.checkpoint("mixtral")
    prompts = [token_ids(seed=seed, batch=1, length=5 + seed)[0].tolist() for seed in range(5)]
    resident = load_resident(folder)
    with torch.no_grad():
        expected = [
            resident.generate(input_ids=torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :].tolist()  # type: ignore[operator]
            for ids in prompts
        ]
    with loaded(folder) as model:
        found = list(penstock.generate_many(model, prompts, max_new_tokens=4))
        assert {answer.index: list(answer.ids) for answer in found} == dict(enumerate(expected))


def test_a_read_that_fails_is_told_and_the_next_run_is_right(shelf: Shelf, tmp_path: Path) -> None:
    folder = shelf.entry("mixtral", torch.float32).save(tmp_path / "short")
    whole = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    with loaded(folder, 0.2) as model:
        run(model)
        for path in whole:
            with path.open("r+b") as file:
                file.truncate(4096)
        with pytest.raises(penstock.PenstockError, match="safetensors"):
            run(model)
        for path, data in whole.items():
            with path.open("r+b") as file:
                file.write(data)
        assert differences(shelf.answers("mixtral"), run(model)) == []


def test_a_plan_for_another_kind_of_model_is_refused(shelf: Shelf) -> None:
    with loaded(shelf.checkpoint("qwen3-moe")) as model:
        plan = model.penstock.plan
    last = plan.blocks[-1]
    for changed, words in (
        ({"expert_passing": 0}, "expert_passing"),
        ({"expert_slots": 1000}, "expert_slots"),
        ({"blocks": (*plan.blocks[:-1], dataclasses.replace(last, home="host"))}, "is an expert"),
    ):
        wrong = dataclasses.replace(plan, **changed)
        with pytest.raises(penstock.UsageError, match=words):
            penstock.load(shelf.checkpoint("qwen3-moe"), plan=wrong, max_memory={"host": 2**24}, device="cpu")


@pytest.mark.parametrize("part", [0.4, 0.8])
def test_what_is_brought_ahead_changes_no_bit(part: float, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "SURE", 0.0)  # routers of random weights are seldom right
    with loaded(shelf.checkpoint("qwen3-moe"), part) as model:
        model.penstock.machinery.session.experts.look_ahead(SLOW_DRIVE)
        for _ in range(3):
            assert differences(shelf.answers("qwen3-moe"), run(model)) == []
        counted = model.penstock.statistics().experts
        assert counted.prefetching.asked > 0
        # with few slots, those that an expert could be brought into are all in use while a layer computes
        assert (counted.prefetching.used > 0) is (part > 0.5)
        assert counted.decode.hits["prefetched"] == counted.prefetching.used


def test_nothing_is_brought_ahead_while_the_rest_is_streamed(shelf: Shelf) -> None:
    with loaded(shelf.checkpoint("qwen3-moe"), 0.0) as model:
        model.penstock.machinery.session.experts.look_ahead(SLOW_DRIVE)
        run(model)
        assert model.penstock.statistics().experts.prefetching is None


def test_who_collects_router_logits_gets_those_of_each_layer_once(shelf: Shelf) -> None:
    """Routers are also asked what they would say of another layer's tokens: nobody else is to hear of that."""
    inputs = {"input_ids": token_ids(length=1), "output_router_logits": True}
    with torch.no_grad():
        expected = load_resident(shelf.checkpoint("mixtral"))(**inputs)
    with loaded(shelf.checkpoint("mixtral"), 0.8) as model:
        experts = model.penstock.machinery.session.experts
        experts.look_ahead(SLOW_DRIVE)
        asked = experts._tap.ask(1, torch.randn(1, 64))
        assert asked is None or asked.shape == (1, 5)
        with torch.no_grad():
            found = model(**inputs)
    assert len(found.router_logits) == len(expected.router_logits) == 3
    for own, other in zip(found.router_logits, expected.router_logits, strict=True):
        assert torch.equal(own, other)


class _Strict(nn.Module):
    """A router that wants to be told more than tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        return hidden @ self.weight.T + bias


class _Plain(_Strict):
    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        return hidden @ self.weight.T


@pytest.mark.parametrize(("router", "width", "tells"), [(_Plain, 8, True), (_Plain, 6, False), (_Strict, 8, False)])
def test_a_router_is_asked_about_tokens_that_it_can_tell_about(router: type[_Strict], width: int, tells: bool) -> None:
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.gate, model.mlp.experts = router(), nn.Module()
    tap = RouterTap(model, [SimpleNamespace(path="mlp.experts")], 4)  # type: ignore[list-item]
    hidden = torch.randn(3, width)
    logits = tap.ask(0, hidden)
    assert (logits is not None) is tells
    if logits is not None:
        assert torch.equal(logits, hidden @ model.mlp.gate.weight.T)
        assert tap.take(0, 3) is None  # it was no layer of its own
    tap.close()


def test_a_profile_tells_hits_misses_and_what_was_brought_ahead(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "SURE", 0.0)
    with loaded(shelf.checkpoint("qwen3-moe"), 0.8) as model:
        model.penstock.machinery.session.experts.look_ahead(SLOW_DRIVE)
        run(model)
        before = model.penstock.statistics().experts
        with Profiler(tmp_path / "run.prof") as profiler:
            for _ in range(3):
                run(model)
        after = model.penstock.statistics().experts
    found = summarise(profiler.profile(), window=(0, 2**62)).experts
    assert found is not None

    def counted(what: Any) -> int:
        """Parts of experts, of which each has two."""
        return 2 * int(sum(what(after.of(phase)) - what(before.of(phase)) for phase in ("prefill", "decode")))

    assert found.uses == counted(lambda phase: phase.uses)
    assert found.missed == counted(lambda phase: sum(phase.misses.values()))
    ahead = counted(lambda phase: phase.hits["prefetched"])
    assert found.ahead_in_time + found.ahead_late == ahead > 0
    assert found.hits == found.uses - found.missed - ahead
    brought = after.prefetching.prefetched - before.prefetching.prefetched
    assert found.ahead_for_nothing == 2 * brought - ahead
