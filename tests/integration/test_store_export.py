"""A run's weights as a checkpoint: transformers loads the very bits that the run had in memory."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import penstock
from penstock.cli import main
from penstock.cli.store import weightfiles
from penstock.memory.store import BlockStore
from penstock.runtime.training.export import plan_export
from penstock.runtime.training.preparing import master_of

DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")
    monkeypatch.setenv("NO_COLOR", "1")


def llama(**changes: Any) -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**DECODER, **changes}))


def mixtral() -> tf.PreTrainedModel:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2))


def save(make: Callable[[], tf.PreTrainedModel], folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(3)
    make().to(dtype).save_pretrained(folder, max_shard_size="40KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def ids(seed: int) -> torch.Tensor:
    return torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(seed))


def train(model: Any, optimizer: Any, steps: int = 3) -> Weights:
    """Train, save, close; the weights as they were at the end."""
    for step in range(steps):
        model(input_ids=ids(step), labels=ids(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    penstock.save(model, optimizer).wait()
    trained = optimizer.training.trained
    lent = master_of(model.penstock.machinery, trained)  # the very weights that a forward would have
    values = {
        id(each.parameter): lent(index).view(each.parameter.shape).to(each.parameter.dtype)
        for index, each in enumerate(trained)
    }
    weights = {name: values[id(each)] for name, each in model.named_parameters(remove_duplicate=False)}
    penstock.close(model)
    return weights


def run_of(source: Path | torch.nn.Module, folder: Path, **options: Any) -> Weights:
    model, optimizer = penstock.prepare(
        source,
        optimizer=penstock.AdamW(lr=1e-2),
        disk=folder,
        device="cpu",
        **{"max_memory": {"host": "256MiB"}, **options},
    )
    return train(model, optimizer)


def stored(folder: Path) -> Weights:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_loads(folder: Path, expected: Weights) -> None:
    model: Any = getattr(tf, tf.AutoConfig.from_pretrained(folder).architectures[0])
    loaded, info = model.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not same(found[name], expected[name])] == []


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def test_an_exported_run_is_loaded_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, run, out = save(llama, tmp_path / "source"), tmp_path / "run", tmp_path / "out"
    weights = run_of(source, run)
    assert main(["store", "export", str(run), str(out)]) == 0
    text, notes = capsys.readouterr()
    assert text == f"{out}\n"
    assert "trained for 3 steps (commit 1)" in notes
    assert_loads(out, weights)
    # AND it looks like the source, but for the values
    before, after = stored(source), stored(out)
    assert after.keys() == before.keys()
    assert not any(torch.equal(after[name], before[name]) for name in before)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    # AND what there is is not overwritten
    assert main(["store", "export", str(run), str(out)]) == 2
    assert main(["store", "export", str(run), str(source), "--force"]) == 2
    assert stored(source).keys() == before.keys()
    assert main(["store", "export", str(run), str(out), "--force", "--dtype", "nonsense"]) == 2
    capsys.readouterr()
    assert main(["store", "export", str(run), str(out), "--force", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["commit"], found["steps"], found["names"]) == (1, 3, "checkpoint")
    assert found["tensors"] == found["trained"] == len(before)
    assert sorted(os.listdir(tmp_path)) == ["out", "run", "source"]


def test_masters_come_out_as_they_are(tmp_path: Path) -> None:
    source, run = save(llama, tmp_path / "source"), tmp_path / "run"
    weights = run_of(source, run)
    assert main(["store", "export", str(run), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    masters = stored(tmp_path / "out")
    assert all(value.dtype == torch.float32 for value in masters.values())
    assert all(same(value.to(torch.bfloat16), weights[name]) for name, value in masters.items())
    assert any(not torch.equal(value, value.to(torch.bfloat16).float()) for value in masters.values())
    assert_loads(tmp_path / "out", masters)


def test_large_checkpoints_come_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weightfiles.WeightFiles.__init__, "__kwdefaults__", {"most_nbytes": 8000})
    weights = run_of(save(llama, tmp_path / "source"), tmp_path / "run")
    assert main(["store", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("model-0*.safetensors"))) > 2
    assert_loads(tmp_path / "out", weights)


def test_experts_go_back_to_where_they_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, run, out = save(mixtral, tmp_path / "source"), tmp_path / "run", tmp_path / "out"
    weights = run_of(source, run)
    assert main(["store", "export", str(run), str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["names"] == "checkpoint"
    assert stored(out).keys() == stored(source).keys()
    assert any(".w1." in name for name in stored(out))
    assert any(".gate_up_proj" in name for name in weights)
    assert_loads(out, weights)


def test_what_transformers_computes_has_the_models_own_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # GIVEN experts that are in too many pieces to be read in place
    source, run, out = save(mixtral, tmp_path / "source"), tmp_path / "run", tmp_path / "out"
    monkeypatch.setattr("penstock.runtime.symbolic.MAX_SPANS", 3)
    weights = run_of(source, run)
    assert main(["store", "export", str(run), str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["names"] == "model"
    assert stored(out).keys() == weights.keys()
    assert_loads(out, weights)


def test_ties_are_as_the_source_has_them(tmp_path: Path) -> None:
    source = save(lambda: llama(tie_word_embeddings=True), tmp_path / "source")
    weights = run_of(source, tmp_path / "run")
    assert main(["store", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "lm_head.weight" not in stored(tmp_path / "out")
    assert_loads(tmp_path / "out", weights)


def test_ties_that_are_stored_twice_are_stored_twice(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save(lambda: llama(tie_word_embeddings=True), tmp_path / "once")
    values = stored(tmp_path / "once")
    source.mkdir()
    (source / "config.json").write_bytes((tmp_path / "once" / "config.json").read_bytes())
    values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
    save_file(values, source / "model.safetensors", {"format": "pt"})
    weights = run_of(source, tmp_path / "run")
    assert main(["store", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    after = stored(tmp_path / "out")
    assert same(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert_loads(tmp_path / "out", weights)


def test_a_moved_source_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, run, out = save(llama, tmp_path / "source"), tmp_path / "run", tmp_path / "out"
    weights = run_of(source, run)
    source.rename(tmp_path / "moved")
    assert main(["store", "export", str(run), str(out)]) == 1
    assert "no such folder" in capsys.readouterr().err
    other = save(lambda: llama(hidden_size=64), tmp_path / "other")
    assert main(["store", "export", str(run), str(out), "--source", str(other)]) == 2
    assert "belongs to another model" in capsys.readouterr().err
    assert not out.exists()
    assert main(["store", "export", str(run), str(out), "--source", str(tmp_path / "moved")]) == 0
    assert_loads(out, weights)


@pytest.mark.parametrize("host", ["13400KiB", "256MiB"])
def test_how_the_run_cut_its_weights_is_found_again(tmp_path: Path, host: str) -> None:
    source = save(lambda: llama(num_hidden_layers=6, hidden_size=64), tmp_path / "source")
    weights = run_of(source, tmp_path / "run", max_memory={"host": host})
    assert main(["store", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert_loads(tmp_path / "out", weights)


def test_damage_is_found_before_anything_is_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, run, out = save(llama, tmp_path / "source"), tmp_path / "run", tmp_path / "out"
    weights = run_of(source, run)
    assert main(["store", "verify", str(run)]) == 0
    assert main(["store", "stats", str(run)]) == 0
    assert f"of {source}\n" in capsys.readouterr().out
    with BlockStore.open(run / "states", readonly=True) as store:
        span = store.location(0)
    with open(span.path, "r+b") as file:
        file.seek(span.offset + 5)
        (byte,) = file.read(1)
        file.seek(span.offset + 5)
        file.write(bytes([byte ^ 1]))
    assert main(["store", "verify", str(run)]) == 1
    assert "bad: block 0 (optimizer 'shard 0')" in capsys.readouterr().out
    assert main(["store", "export", str(run), str(out)]) == 1
    assert "is corrupt" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["run", "source"]
    with open(span.path, "r+b") as file:
        file.seek(span.offset + 5)
        file.write(bytes([byte]))
    # AND the other half of the store is not needed
    assert main(["store", "prune", str(run)]) == 0
    assert main(["store", "verify", str(run)]) == 0
    assert main(["store", "export", str(run), str(out)]) == 0
    assert_loads(out, weights)


class Net(torch.nn.Module):
    """A convolution with channels last, and a layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.frozen = torch.nn.Linear(8, 8).requires_grad_(False)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(self.conv(images).mean((2, 3))))  # type: ignore[no-any-return]


class InMemory:
    """Takes what is written."""

    def __init__(self) -> None:
        self.tensors: dict[str, bytearray] = {}

    def write(self, name: str, offset: int, data: memoryview) -> None:
        held = self.tensors.setdefault(name, bytearray())
        held.extend(bytes(max(0, offset + len(data) - len(held))))
        held[offset : offset + len(data)] = data


def test_a_run_of_a_module_needs_the_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def net() -> Net:
        torch.manual_seed(5)
        return Net()

    run = tmp_path / "run"
    model, optimizer = penstock.prepare(
        net(), optimizer=penstock.SGD(lr=1e-2), disk=run, device="cpu", max_memory={"host": "256MiB"}
    )
    weights = dict(net().named_parameters())
    penstock.save(model, optimizer).wait()
    penstock.close(model)
    # commits do not say shapes, so the command line cannot
    assert main(["store", "export", str(run), str(tmp_path / "out")]) == 2
    assert "the run began with a module" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    sink = InMemory()
    with BlockStore.open(run / "states", readonly=True) as store:
        planned = plan_export(store, module=net())
        planned.write_masters(store, sink)
    assert [tensor.name for tensor in planned.tensors] == ["conv.weight", "conv.bias", "head.weight", "head.bias"]
    for tensor in planned.tensors:
        found = torch.frombuffer(sink.tensors[tensor.name], dtype=torch.float32).view(tensor.shape)
        assert torch.equal(found, weights[tensor.name])
