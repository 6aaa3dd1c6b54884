"""The benchmark's checkpoint of experts routes as a made-up trace does, and its bounds are those of the routing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from benchmarks.contenders.protocol import Report
from benchmarks.moe_checkpoint import SHAPES, draw_tensor, ensure_moe, words
from benchmarks.moe_score import needs_of, score, summarise
from benchmarks.scoreboard import FRAMEWORK_NBYTES, YARDSTICK, Attempt
from penstock.runtime.experts.recording import RoutingRecorder
from penstock.scheduler.experts.generate import generate_trace
from penstock.scheduler.experts.recipe import Recipe
from penstock.scheduler.experts.trace import Trace
from penstock.scheduler.experts.tracefile import read_trace

SHAPE = SHAPES["tiny"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_moe(tmp_path_factory.mktemp("moe"), SHAPE)


@pytest.fixture(scope="module")
def trace(checkpoint: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    text = torch.tensor([words(SHAPE, 200)])
    path = checkpoint.parent / "routing.moe"
    with RoutingRecorder(model, path, source="a test") as recorder, torch.no_grad():
        recorder.sequences(1)
        cache = model(input_ids=text[:, :20], use_cache=True).past_key_values
        for at in range(20, text.shape[1]):
            model(input_ids=text[:, at : at + 1], past_key_values=cache, use_cache=True)
    return path


def test_the_file_has_the_tensors_of_the_architecture(checkpoint: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == sum(int(np.prod(dims)) for _, dims in SHAPE.dims())
    up = draw_tensor(SHAPE, "model.layers.1.mlp.experts.3.up_proj.weight", (SHAPE.expert_ffn, SHAPE.hidden_size))
    fused = model.model.layers[1].mlp.experts.gate_up_proj[3]
    assert torch.equal(fused[SHAPE.expert_ffn :], up)
    assert ensure_moe(checkpoint.parent, SHAPE) == checkpoint  # what is there is not written again


def shares(trace: Trace) -> tuple[float, float]:
    """Of choices: how many the most liked quarter of experts gets, and how many are those of the token before."""
    routing, chosen = trace.header.routing, trace.experts[:, :, : trace.header.routing.top_k]
    skew, reuse = [], []
    for layer in chosen:
        counts = np.sort(np.bincount(layer.ravel(), minlength=routing.experts))[::-1]
        skew.append(counts[: routing.experts // 4].sum() / counts.sum())
        reuse += [len({*a} & {*b}) / routing.top_k for a, b in zip(layer[1:], layer[:-1], strict=True)]
    return float(np.mean(skew)), float(np.mean(reuse))


def test_routing_has_the_skew_and_the_memory_of_a_made_up_trace(trace: Path) -> None:
    found = read_trace(trace)
    made = generate_trace(Recipe(routing=found.header.routing, requests=1, prompt=20, generate=180))
    for ours, theirs in zip(shares(found), shares(made), strict=True):
        assert ours == pytest.approx(theirs, abs=0.15)
    skew, reuse = shares(found)
    assert skew > 0.4  # 0.25 if all experts were alike
    assert reuse > SHAPE.top_k / SHAPE.expert_count


def test_a_bound_counts_what_a_cache_of_the_room_misses(trace: Path) -> None:
    weights = sum(2 * int(np.prod(dims)) for _, dims in SHAPE.dims())
    beside = weights - SHAPE.experts_nbytes - SHAPE.embedding_nbytes
    total = SHAPE.layer_count * SHAPE.expert_count
    uses = SHAPE.layer_count * SHAPE.top_k * SHAPE.expert_nbytes
    before = None
    for capacity in (0, 8, 24, total):
        cap = FRAMEWORK_NBYTES + beside + capacity * SHAPE.expert_nbytes
        needs = needs_of(trace, SHAPE, cap_nbytes=cap, weights_nbytes=weights)
        assert needs.capacity == capacity
        assert needs.foreseen <= min(needs.cached, needs.page_cache) <= uses
        if capacity == 0:
            assert needs.foreseen == needs.cached == needs.page_cache == pytest.approx(uses)
        assert before is None or needs.cached <= before
        before = needs.cached


def test_a_run_is_held_against_its_own_misses_and_those_of_the_routing(trace: Path) -> None:
    def attempt(name: str, s_per_token: float, figures: dict[str, float]) -> Attempt:
        report = Report(
            loaded_s=1.0,
            token_s=[2.0, 2.0 + s_per_token, 2.0 + 2 * s_per_token],
            token_read_nbytes=[0, 500, 1000],
            tokens=[[1, 2, 3]],
            versions={},
            figures=figures,
        )
        return Attempt(contender=name, batch=1, round_number=1, report=report, disk_before_nbytes_per_s=100.0)

    runs = [attempt(YARDSTICK, 1.0, {}), attempt("penstock", 6.0, {"misses": 6, "prefetched": 2})]
    _, own = score(runs, None, expert_nbytes=100, yardstick=YARDSTICK)
    assert own.missed_nbytes == [400.0]  # (6 + 2) experts of 100 bytes for two tokens
    assert own.read_over_missed == [500 / 400]
    assert own.bounds_own_s == [4.0]  # 400 bytes at 100 a second: more than the second of computing
    assert own.bounds_s == []
    assert own.tokens_equal == 1.0


def test_what_is_missing_is_said(trace: Path) -> None:
    def attempt(name: str, figures: dict[str, float]) -> Attempt:
        report = Report(
            loaded_s=1.0,
            token_s=[2.0, 3.0],
            token_read_nbytes=[0, 500],
            tokens=[[1, 2]],
            versions={},
            figures=figures,
        )
        return Attempt(contender=name, batch=1, round_number=1, report=report, disk_before_nbytes_per_s=100.0)

    failed = Attempt(contender="accelerate", batch=1, round_number=1, failure="killed: over the cap")
    figures = {"misses": 4.0, "prefetched": 0.0}
    lines = summarise(score([attempt("penstock", figures), failed], None, expert_nbytes=100, yardstick=YARDSTICK))
    assert any("disk alone" in line for line in lines)
    assert any("nothing was brought ahead" in line for line in lines)
    assert any("accelerate has no result" in line for line in lines)
    assert not any("mmap" in line for line in lines)  # nobody asked for it
    runs = [attempt(YARDSTICK, {}), attempt("penstock", {**figures, "ahead_brought": 5.0, "ahead_used": 3.0})]
    lines = summarise(score(runs, None, expert_nbytes=100, yardstick=YARDSTICK))
    assert any("brought ahead: 5 experts, 3 of them used" in line for line in lines)
    assert not any("disk alone" in line or "no result" in line for line in lines)


def test_a_prompt_that_is_short_is_not_among_the_tokens_of_a_bound(checkpoint: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    text = torch.tensor([words(SHAPE, 8)])
    path = tmp_path / "short.moe"
    with RoutingRecorder(model, path, source="a test") as recorder, torch.no_grad():
        recorder.sequences(1)
        cache = model(input_ids=text[:, :4], use_cache=True).past_key_values
        for at in range(4, 8):
            model(input_ids=text[:, at : at + 1], past_key_values=cache, use_cache=True)
    assert set(map(read_trace(path).phase, range(5))) == {"decode"}
    weights = sum(2 * int(np.prod(dims)) for _, dims in SHAPE.dims())
    needs = needs_of(path, SHAPE, cap_nbytes=0, weights_nbytes=weights)
    assert needs.cached == needs.foreseen == SHAPE.layer_count * SHAPE.top_k * SHAPE.expert_nbytes
