"""`penstock plan --sizes`: the table, the document, and every way to say no."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from penstock.budget import MemoryBudget
from penstock.cli import main
from penstock.cli.estimate import find_rooms
from penstock.memory.errors import UsageError

MIB = 2**20


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config of some MiB of weights, and nothing else."""
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=256, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    return tmp_path


def plan(folder: Path, *options: str) -> int:
    return main(["plan", str(folder), "--sizes", "--device", "cpu", *options])


def test_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder, "--max-memory", "host=1GiB,disk=1GiB", "--context", "64") == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert out.startswith("LlamaForCausalLM, 0.0")
    assert "inference, batch 1, context 64" in out
    lines = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert lines["weights"].split() == ["weights", *["14.01", "MiB"] * 3, "-"]
    assert lines["KV cache"].split()[:3] == ["KV", "cache", "512.00"]  # 2 · 4 layers · 256 · 4 bytes · 64 tokens
    assert lines["room"].split() == ["room", "1.00", "GiB", "1.00", "GiB"]
    assert "model.layers.*" in out
    assert "fits: everything is resident on the host" in out
    assert "gradients " not in lines["weights"]
    assert "optimizer" not in lines


def test_the_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder, "--train", "adamw", "--batch", "2", "--json", "--max-memory", "host=1GiB,disk=1GiB") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["workload"] == {
        "train": "adamw", "batch": 2, "context": 256, "packed": False, "rank": 16, "targets": [], "dropout": 0.0,
    }  # fmt: skip
    assert document["most"]["optimizer"] == 8 * document["parameters"]
    assert document["most"]["gradients"] == 4 * document["trainable"]
    assert document["total_nbytes"] == sum(document["peak"].values())
    assert document["checkpointed"]["activations"] <= document["peak"]["activations"]
    assert document["fitting"]["verdict"] == "resident"
    assert [share["tier"] for share in document["fitting"]["shares"]] == ["host", "disk"]
    assert document["modules"][0]["path"] == "model.layers.*"
    assert document["modules"][0]["count"] == 4


def test_what_is_too_much_is_streamed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder, "--max-memory", "host=10MiB,disk=1MiB", "--context", "64") == 0
    out = capsys.readouterr().out
    assert "fits when streamed" in out
    assert "on the disk, brought to the host when it is used" in out
    assert "--dtype bfloat16 would take" in out
    assert main(["plan", str(folder), "--sizes", "--max-memory", "device=8MiB,host=1GiB", "--context", "64"]) == 0
    assert "MiB on the host, brought to the device" in capsys.readouterr().out


def test_what_does_not_fit_is_3(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder, "--max-memory", "host=1MiB,disk=1GiB", "--context", "64") == 3
    out, error = capsys.readouterr()
    assert "weights" in out  # the table comes all the same
    assert error.startswith("error: ")
    assert "does not fit even when streamed: it needs" in error
    assert "of the host, which has 1.00 MiB" in error
    assert len(error.splitlines()) == 1


def test_a_smaller_change_is_suggested(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder, "--train", "adamw", "--batch", "8", "--max-memory", "host=225MiB,disk=1GiB") == 0
    assert "activation checkpointing would take" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--train", "sgd"), "use adamw or lora"),
        (("--context", "999"), "256 positions"),
        (("--max-memory", "8G"), "host=8G"),
        (("--dtype", "int3"), "int3"),
        (("--device", "tpu"), "unknown device 'tpu'"),
        (("--batch", "0"), "--batch"),
        (("--context", "1"), "--context"),
    ],
)
def test_usage(folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str) -> None:
    assert plan(folder, *options) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert words in error
    assert "Traceback" not in error


def test_options_of_sizes_need_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--context", "64"]) == 2
    assert "--context is about training: add --train adamw, or for its sizes alone --sizes" in capsys.readouterr().err
    assert main(["plan", str(folder), "--train", "adamw", "--rank", "8"]) == 2
    assert "write --lora r=8" in capsys.readouterr().err
    assert plan(folder, "--train", "adamw", "--accumulate", "2") == 2
    assert "--sizes and --accumulate exclude each other" in capsys.readouterr().err
    for option in ("--prompt", "--generate"):
        assert plan(folder, option, "8") == 2
        assert f"--sizes and {option} exclude each other" in capsys.readouterr().err
    assert main(["plan", str(folder), "--model", str(folder / "config.json"), "--sizes"]) == 2
    assert "CKPT and --model exclude each other" in capsys.readouterr().err
    assert main(["plan", str(folder), "--chart", "x.html"]) == 2
    assert "--chart draws a sweep" in capsys.readouterr().err
    assert main(["plan", str(folder), "--throughput", "--batch", "2"]) == 2
    assert "--throughput and --batch exclude each other" in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert "give CKPT" in capsys.readouterr().err


def test_folders_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(tmp_path / "nowhere" / "at" / "all") == 1
    assert "no such folder" in capsys.readouterr().err
    assert plan(tmp_path) == 1
    assert "no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert plan(tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


def test_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = MemoryBudget(device=5, host=6, disk=7)
    found = find_rooms(asked, device="auto", disk=None)
    assert [(room.tier, room.nbytes, room.source) for room in found] == [
        ("device", 5, "--max-memory"), ("host", 6, "--max-memory"), ("disk", 7, "--max-memory"),
    ]  # fmt: skip
    assert [room.tier for room in find_rooms(asked, device="cpu", disk=None)] == ["host", "disk"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    free = find_rooms(MemoryBudget(), device="auto", disk=Path("/"))
    assert [(room.tier, room.source) for room in free] == [("host", "free now"), ("disk", "free now")]
    assert all(room.nbytes > 0 for room in free)
    with pytest.raises(UsageError, match="device=24GiB"):
        find_rooms(MemoryBudget(), device="cuda", disk=None)
