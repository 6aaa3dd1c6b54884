"""`penstock finetune`: what is refused before anything is written, and what an option becomes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from zoo.finetune import write_checkpoint, write_rows

from penstock.cli import main
from penstock.cli.finetune_job import check_ids, optimizer_choice, sequence_length
from penstock.cli.finetune_request import Recipe
from penstock.memory.errors import UsageError
from penstock.runtime.training.decay import undecayed
from penstock.runtime.training.optimizers import SGD, AdamW, Lion

RECIPE = Recipe(
    steps=None, epochs=None, batch=1, accumulate=1, seq=None, optimizer="adamw", lr=None, schedule="linear", warmup=0.0,
    weight_decay=None, no_decay=None, betas=None, momentum=None, clip=1.0, nonfinite="raise", seed=0, eval_fraction=0.0,
    too_long="truncate", dtype="auto",
)  # fmt: skip

LLAMA = {
    "model.embed_tokens.weight": (257, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.1.self_attn.q_proj.weight": (64, 64),
    "model.layers.1.input_layernorm.weight": (64,),
    "model.norm.weight": (64,),
}


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "zen.jsonl")


def changed(**options: Any) -> Recipe:
    return dataclasses.replace(RECIPE, **options)


def finetune(folder: Path, rows: Path, out: Path, *options: str) -> int:
    return main(["finetune", str(folder), "--data", str(rows), "--out", str(out), "--device", "cpu", *options])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", "3", "--epochs", "1"), "exclude each other"),
        (("--epochs", "0"), "above 0"),
        (("--optimizer", "adam"), "adamw, lion, sgd"),
        (("--schedule", "step"), "constant, linear, cosine"),
        (("--too-long", "cut"), "truncate, leave-out, refuse"),
        (("--nonfinite", "ignore"), "raise, skip"),
        (("--activations", "disk"), "auto, keep, recompute, offload"),
        (("--warmup", "1.5"), "neither whole steps nor a share"),
        (("--warmup", "9", "--steps", "3"), "9 steps is longer"),
        (("--eval-fraction", "1"), "nothing to train on"),
        (("--eval-every", "2"), "--eval-fraction"),
        (("--momentum", "0.5"), "no option of adamw"),
        (("--optimizer", "sgd", "--betas", "0.9,0.95"), "no option of sgd"),
        (("--betas", "0.9"), "two numbers"),
        (("--no-decay", "nothing*"), "matches none"),
        (("--resume", "--force"), "one of them"),
        (("--max-memory", "8G"), "host=8G"),
        (("--seq", "257"), "more than the 256 positions"),
        (("--commit-minutes", "0"), "above 0"),
        (("--lora", "r=16,alhpa=3"), "did you mean alpha"),
        (("--lora", "r=16,targets=nothing"), "PEFT cannot put these adapters into a LlamaForCausalLM"),
        (("--lora", "r=16", "--no-decay", "*norm*"), "matches none"),
    ],
)
def test_usage(
    checkpoint: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    words: str,
) -> None:
    assert finetune(checkpoint, rows, tmp_path / "run", *options) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert words in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run" / "states").exists()


def test_data_and_folder_are_looked_at_first(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(checkpoint, tmp_path / "none.jsonl", tmp_path / "run") == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert finetune(checkpoint, rows, tmp_path / "file") == 2
    assert "is no folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_a_tokenizer(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in checkpoint.iterdir():
        if not file.name.startswith("tokenizer"):
            (bare / file.name).symlink_to(file)
    assert finetune(bare, rows, tmp_path / "run") == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_a_tokenizer_with_more_tokens_than_the_model(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = write_checkpoint(tmp_path / "small", vocab_size=40)
    assert finetune(small, rows, tmp_path / "run") == 2
    assert "the model knows 0 to 39" in capsys.readouterr().err


def test_a_budget_that_is_too_small_leaves_no_run(checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second is not told that there is a run
        assert finetune(checkpoint, rows, tmp_path / "run", "--max-memory", "host=300KiB") == 3


class Bones:
    """As much of a model as is looked at."""

    main_input_name = "input_ids"

    def __init__(self, *, positions: int | None = 256, continues: bool = True) -> None:
        self.is_encoder_decoder = False
        self.config = self
        self.max_position_embeddings = positions
        self.continues = continues

    def can_generate(self) -> bool:
        return self.continues

    def get_text_config(self, *, decoder: bool) -> Bones:
        assert decoder
        return self

    def get_input_embeddings(self) -> None:
        return None


def test_length_of_a_sequence() -> None:
    assert sequence_length(Bones(), None) == 256
    assert sequence_length(Bones(positions=4096), None) == 1024
    assert sequence_length(Bones(positions=None), 4096) == 4096
    assert sequence_length(Bones(), 256) == 256
    with pytest.raises(UsageError, match="does not continue texts"):
        sequence_length(Bones(continues=False), None)
    check_ids(Bones(), 10**6)  # nothing is known of it


def test_optimizers_and_their_groups() -> None:
    adamw = optimizer_choice(RECIPE, LLAMA)
    assert isinstance(adamw, AdamW)
    assert (adamw.lr, adamw.betas, adamw.weight_decay, adamw.max_grad_norm) == (1e-5, (0.9, 0.999), 0.01, 1.0)
    assert dict(adamw.groups or {}) == {
        "model.layers.*.input_layernorm.weight": {"weight_decay": 0.0},
        "model.norm.weight": {"weight_decay": 0.0},
    }
    all_decayed = optimizer_choice(changed(no_decay="none", clip=0, betas="0.8, 0.9", lr=1.0), LLAMA)
    assert isinstance(all_decayed, AdamW)
    assert (all_decayed.groups, all_decayed.max_grad_norm) == (None, None)
    assert (all_decayed.betas, all_decayed.lr) == ((0.8, 0.9), 1.0)
    named = optimizer_choice(changed(optimizer="lion", no_decay="*embed*, *norm*"), LLAMA)
    assert isinstance(named, Lion)
    assert list(named.groups or {}) == ["*embed*", "*norm*"]
    sgd = optimizer_choice(changed(optimizer="sgd"), LLAMA)
    assert isinstance(sgd, SGD)
    assert (sgd.momentum, sgd.weight_decay, sgd.groups) == (0.9, 0.0, None)
    assert optimizer_choice(changed(optimizer="sgd", weight_decay=0.1), LLAMA).groups is not None


def test_patterns_that_would_match_too_much_give_way_to_names() -> None:
    shapes = {"a.0.b": (4,), "a.1.b": (4, 4), "c.bias": (4, 4), "d[0]": (4,)}
    assert undecayed(shapes) == ("a.0.b", "c.bias", "d[[]0]")
    assert undecayed({"w": (2, 2)}) == ()


def test_settings_of_a_run() -> None:
    settings = changed(warmup=0.1, betas="0.9,0.95").settings(checkpoint="here", seq=8, steps=50)
    assert settings["steps"] == 50
    assert settings["warmup"] == 5
    assert settings["betas"] == [0.9, 0.95]
    assert settings["weight-decay"] == 0.01
    assert json.loads(json.dumps(settings)) == settings
    assert "steps" not in changed(schedule="constant").settings(checkpoint="here", seq=8, steps=50)
    assert changed(warmup=7).warmup_steps(50) == 7
