"""`penstock plan --system`: the document, the lines, and every way to say no."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cli import main

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "work.json").write_text(json.dumps({"kind": "batch", "batch": 4}))
    (tmp_path / "tune.json").write_text(json.dumps({"kind": "finetune", "batch": 4}))
    return tmp_path


def plan(files: Path, name: str, *more: str, work: str = "work.json", hardware: str = "rtx4090-1ssd") -> int:
    return main(
        [
            *("plan", "--system", name, "--hardware", hardware),
            *("--model", str(files / "config.json"), "--workload", str(files / work), *more),
        ]
    )


def test_the_document(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(files, "zero-inference", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["system"] == "zero-inference"
    assert found["model"]["parameters"] == 8_030_261_248
    assert found["s_per_token"] == found["s_per_step"] > 0
    assert found["binds"] in found["busy"]


def test_the_document_of_training(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(files, "zero-infinity", "--json", work="tune.json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tflops"] > 0
    assert "s_per_token" not in found


def test_the_lines(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(files, "accelerate") == 0
    out = capsys.readouterr().out
    assert out.startswith("accelerate on RTX 4090")
    assert "tokens/s, 4 sequences of 512 + 32" in out
    assert plan(files, "lohan", work="tune.json") == 0
    assert "TFLOPS per GPU" in capsys.readouterr().out


def test_a_hardware_file(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = files / "box.json"
    machine.write_text('{"name": "box", "cpu": {}}')
    assert plan(files, "accelerate", hardware=str(machine)) == 2
    assert "cpu.name is missing" in capsys.readouterr().err


def test_what_is_missing_is_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--system", "flexgen", "--hardware", "t4-gcp"]) == 2
    assert "--system needs --model and --workload" in capsys.readouterr().err
    assert main(["plan", "--sizes"]) == 2
    assert "give CKPT" in capsys.readouterr().err
    for options in (("--accumulate", "2"), ("--prompt", "8"), ("--batch", "2"), ("--dtype", "float16"), ("--force",)):
        assert plan(files, "flexgen", *options) == 2
        assert f"--system and {options[0]} exclude each other" in capsys.readouterr().err
    assert plan(files, "nosuch") == 2
    assert "use accelerate" in capsys.readouterr().err


def test_what_does_not_fit_is_3(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "work.json").write_text(json.dumps({"kind": "batch", "batch": 4096}))
    assert plan(files, "accelerate") == 3
    assert "use a smaller batch" in capsys.readouterr().err


def test_it_needs_no_torch() -> None:
    code = "import sys, penstock.cli.plan_system; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
