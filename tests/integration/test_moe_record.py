"""Routing traces of models that run: what routers really said, and what the laboratory makes of it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_experts import MOE, entry, gpt_oss, limits, loaded, qwen3
from zoo import load_resident
from zoo.decoders import token_ids

import penstock
from penstock.cli import main
from penstock.runtime.experts.recording import RoutingRecorder
from penstock.runtime.experts.routers import candidates
from penstock.scheduler.experts.cache import CacheSetting
from penstock.scheduler.experts.events import events_of
from penstock.scheduler.experts.policies import DEFAULT, policy
from penstock.scheduler.experts.replay import ReplaySetting, replay
from penstock.scheduler.experts.trace import Trace
from penstock.scheduler.experts.tracefile import read_trace

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return entry("qwen3-moe", transformers.Qwen3MoeForCausalLM, qwen3).save(tmp_path_factory.mktemp("recorded") / "q")


@pytest.fixture
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")


def generate(model: Any, recorder: RoutingRecorder | None, *, batch: int, tokens: int = 5) -> None:
    if recorder is not None:
        recorder.sequences(batch)
    with torch.no_grad():
        model.generate(input_ids=token_ids(seed=batch, batch=batch, length=7), max_new_tokens=tokens, do_sample=False)


def record(model: Any, path: Path) -> Trace:
    with RoutingRecorder(model, path, source="a test") as recorder:
        generate(model, recorder, batch=1)
        generate(model, recorder, batch=2)
        assert recorder.left_out == 0
    return read_trace(path)


def heard(model: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same runs, with what each layer's experts are called with: [chosen [T, K], hidden [T, H]]."""
    found: list[tuple[np.ndarray, np.ndarray]] = []

    def note(module: Any, args: Any) -> None:
        found.append((args[1].numpy().copy(), args[0].numpy().copy()))

    hooks = [layer.mlp.experts.register_forward_pre_hook(note) for layer in expert_layers(model)]
    generate(model, None, batch=1)
    generate(model, None, batch=2)
    for hook in hooks:
        hook.remove()
    return found


def expert_layers(model: Any) -> list[Any]:
    return [layer for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def test_the_trace_has_what_routers_chose_and_guessed(checkpoint: Path, tmp_path: Path) -> None:
    model: Any = load_resident(checkpoint)
    trace = record(model, tmp_path / "resident.moe")
    calls = heard(model)
    header = trace.header
    layers, experts, top_k = header.routing.layers, header.routing.experts, header.routing.top_k
    assert (layers, experts, top_k, header.width) == (2, 16, 4, 8)
    assert header.paths == ("model.layers.0.mlp.experts", "model.layers.2.mlp.experts")
    assert header.expert is not None
    assert (header.expert.hidden, header.expert.ffn, header.expert.gated, header.expert.dtype) == (
        64, 40, True, "float32",
    )  # fmt: skip
    assert [trace.phase(step) for step in range(trace.steps)] == (["prefill"] + ["decode"] * 4) * 2
    assert np.diff(trace.begins).tolist() == [7, 1, 1, 1, 1, 14, 2, 2, 2, 2]
    assert trace.requests.tolist() == [0] * 11 + [1] * 7 + [2] * 7 + [1, 2] * 4
    for layer in range(layers):
        chosen = np.concatenate([ids for ids, _ in calls[layer::layers]])
        assert np.array_equal(trace.experts[layer, :, :top_k], chosen)
    assert trace.guesses is not None
    assert (trace.guesses[0] == experts).all()
    gate = expert_layers(model)[1].mlp.gate.weight
    above = torch.from_numpy(np.concatenate([hidden for _, hidden in calls[0::layers]]))
    guessed = (above @ gate.T).topk(top_k, dim=-1).indices.sort().values
    assert np.array_equal(np.sort(trace.guesses[1], axis=1), guessed.numpy())


def test_scores_are_those_of_the_router_and_near_ones_come_next() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 4.0, 3.0, 0.0]])
    chosen = torch.tensor([[3], [1]])  # a router with biases does not choose by logits alone
    ids, scores = candidates(chosen, logits, 3)
    assert ids.tolist() == [[3, 1, 2], [1, 0, 2]]
    assert torch.equal(scores, logits.softmax(-1).gather(1, ids))


def test_a_streamed_run_is_routed_as_a_resident_one(checkpoint: Path, tmp_path: Path) -> None:
    expected = record(load_resident(checkpoint), tmp_path / "resident.moe")
    with loaded(checkpoint, 0.3) as model:
        found = record(model, tmp_path / "streamed.moe")
    assert np.array_equal(found.experts, expected.experts)
    assert np.array_equal(found.guesses, expected.guesses)  # type: ignore[arg-type]
    assert np.array_equal(found.scores, expected.scores)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_a_replay_hits_what_the_run_hit(checkpoint: Path, tmp_path: Path, part: float) -> None:
    """The cache that runs and the laboratory's are one; scores in a trace have 16 bits, which may turn a tie."""
    with loaded(checkpoint, part) as model:
        path = tmp_path / "run.moe"
        with RoutingRecorder(model, path, source="a test") as recorder:
            for batch in (1, 2, 1):
                generate(model, recorder, batch=batch, tokens=20)
        counted = model.penstock.statistics().experts
    trace = read_trace(path)
    setting = ReplaySetting(cache=CacheSetting(capacity=counted.capacity))
    routing = trace.header.routing
    result = replay(routing, events_of(trace), policy(DEFAULT, routing), setting)
    assert counted.decode.uses == result.decode.uses
    assert counted.prefill.hits == result.prefill.hits
    assert abs(sum(counted.decode.hits.values()) - sum(result.decode.hits.values())) <= 2
    assert counted.decode.tokens == result.decode.tokens


def test_routers_that_are_streamed_are_asked_too(tmp_path: Path) -> None:
    made = entry("gpt-oss", transformers.GptOssForCausalLM, gpt_oss)
    folder = made.save(tmp_path / "g")
    expected = record(load_resident(folder), tmp_path / "resident.moe")
    with loaded(folder, 0.0) as model:
        found = record(model, tmp_path / "streamed.moe")
    assert expected.guesses is not None
    assert np.array_equal(found.experts, expected.experts)
    assert np.array_equal(found.guesses, expected.guesses)  # type: ignore[arg-type]


def test_calls_that_fail_are_left_out(checkpoint: Path, tmp_path: Path) -> None:
    model: Any = load_resident(checkpoint)
    broken: Any = expert_layers(model)[1].mlp
    plain = broken.forward
    with RoutingRecorder(model, tmp_path / "t.moe", source="a test") as recorder:
        broken.forward = partial(_fail)
        with pytest.raises(ZeroDivisionError):
            generate(model, recorder, batch=1)
        broken.forward = plain
        generate(model, recorder, batch=1)
        assert (recorder.steps, recorder.left_out) == (5, 1)
    assert read_trace(tmp_path / "t.moe").steps == 5
    generate(model, None, batch=1)  # and nothing is watched any more


def _fail(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MOE))
    with pytest.raises(penstock.UsageError, match="no experts"):
        RoutingRecorder(model, tmp_path / "t.moe", source="a test")
    assert not (tmp_path / "t.moe").exists()


def test_the_verb_records_and_others_read_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_debug: None
) -> None:
    least, most = limits(checkpoint)
    path, prompts = tmp_path / "run.moe", tmp_path / "prompts.jsonl"
    prompts.write_text('{"ids": [5, 6, 7, 8]}\n{"ids": [9, 10, 11], "max_new_tokens": 3}\n')
    options = ("--prompts", str(prompts), "--max-new-tokens", "6", "--device", "cpu")
    budget = ("--max-memory", f"host={(least + most) // 2 // 1024}KiB")
    assert main(["moe", "record", str(checkpoint), str(path), *options, *budget]) == 0
    out, notes = capsys.readouterr()
    assert out == f"{path}\n"
    assert "9 steps, 14 tokens" in notes
    assert "experts that were there when they were asked for" in notes
    trace = read_trace(path)
    assert trace.requests.tolist() == [0] * 9 + [1] * 5
    assert trace.header.source.endswith("2 prompts, 7 tokens")
    assert main(["moe", "replay", str(path), "--hardware", "cpu-only", "--capacity", "25%", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["policy"] for row in rows} >= {"MIN", "mrs", "lru"}
    assert main(["moe", "report", str(path), "-o", str(tmp_path / "page.html"), "--hardware", "cpu-only"]) == 0
    assert "2 prompts, 7 tokens" in (tmp_path / "page.html").read_text()
    before = path.read_bytes()
    assert main(["moe", "record", str(checkpoint), str(path), *options, *budget]) == 2
    assert path.read_bytes() == before
    assert main(["moe", "record", str(checkpoint), str(path), "--prompt-ids", "5", *budget, "--force"]) == 0
    assert read_trace(path).requests.max() == 0


def test_the_verb_asks_for_one_kind_of_prompt(checkpoint: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "run.moe")
    assert main(["moe", "record", str(checkpoint), path]) == 2
    assert main(["moe", "record", str(checkpoint), path, "--prompts", "a", "--prompt", "b"]) == 2
    assert main(["moe", "record", str(checkpoint), path, "--prompt-ids", "5", "--seed", "1"]) == 2
