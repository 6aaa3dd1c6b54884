"""`penstock plan` for a run: forecasts, sweeps, targets, files; on machines from files, so that they are the same here
and anywhere."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from test_predicted_profile import CONFIG

from penstock.cli import main
from penstock.cli.sweep import Sweep, parse_sweep
from penstock.memory.errors import UsageError
from penstock.scheduler.planfile import read_plan

MACHINE: dict[str, Any] = {
    "name": "paper",
    "cpu": {
        "name": "a CPU", "cores": 8, "memory_gb": 16, "bandwidth_gb_per_s": 20, "memory_fraction": 1.0,
        "tflops": {"float32": 0.5}, "tflops_fraction": 1.0, "launch_us": 1,
    },
    "drives": [{"name": "a drive", "read_gb_per_s": 0.2, "write_gb_per_s": 0.1, "latency_us": 50}],
    "price_usd": 1000,
    "sources": ["made up"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG", raising=False)  # which would have errors shown with tracebacks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "machine.json").write_text(json.dumps(MACHINE))
    return path


def plan(folder: Path, *options: str) -> int:
    return main(["plan", str(folder), "--hardware", str(folder / "machine.json"), "--prompt", "16", *options])


def test_a_forecast_says_where_how_fast_and_what_binds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder, "--generate", "8", "--max-memory", "host=16MiB") == 0
    out = capsys.readouterr().out
    assert "on paper: prompt 16, answer 8 tokens, batch 1" in out
    assert "bound by the disk: per token disk" in out
    assert plan(folder, "--generate", "8", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["resident"], found["binds"], found["batch"], found["advice"]) == (True, "CPU", 1, None)
    assert found["answer_s"] == pytest.approx(found["first_token_s"] + 7 * found["token_s"])
    assert found["tokens_per_s"] == pytest.approx(8 / found["answer_s"])


def test_throughput_chooses_the_batch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = {}
    for batch in ("1", "4"):
        assert plan(folder, "--generate", "8", "--batch", batch, "--max-memory", "host=16MiB", "--json") == 0
        rates[batch] = json.loads(capsys.readouterr().out)["tokens_per_s"]
    assert plan(folder, "--generate", "8", "--throughput", "--max-memory", "host=16MiB", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] > 1
    assert found["tokens_per_s"] >= max(rates.values())


def test_throughput_alternates_where_that_pays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU that is as slow as the CPU, and holds half of the weights: two micro-batches alternate."""
    gpu = {
        "name": "a GPU", "memory_gb": 6, "bandwidth_gb_per_s": 20, "memory_fraction": 1.0,
        "tflops": {"float32": 0.015}, "tflops_fraction": 1.0, "launch_us": 0.1,
    }  # fmt: skip
    link = {"h2d_gb_per_s": 2, "d2h_gb_per_s": 2, "latency_us": 1}
    cpu = {**MACHINE["cpu"], "tflops": {"float32": 0.02}}
    (folder / "gpu.json").write_text(json.dumps({**MACHINE, "cpu": cpu, "gpu": gpu, "link": link}))
    asked = ["plan", str(folder), "--hardware", str(folder / "gpu.json"), "--prompt", "16", "--generate", "8"]
    asked += ["--throughput", "--max-memory", "device=20MiB,host=2GiB"]
    assert main(asked) == 0
    assert "micro-batches of" in (told := capsys.readouterr().out)
    assert "alternate between the processors" in told
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lanes"] == 2
    assert 0 < found["cpu_share"] <= 1


def test_a_sweep_gets_faster_with_memory_and_draws_itself(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chart = tmp_path / "sweep.html"
    sweep = ("--generate", "8", "--sweep", "host=12MiB:48MiB")
    assert plan(folder, *sweep, "--chart", str(chart)) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:2] == ["host", "tokens/s"]
    assert plan(folder, *sweep, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["host"] for each in found] == list(parse_sweep("host=12MiB:48MiB").values)
    times = [each["token_s"] for each in found]
    assert times == sorted(times, reverse=True)
    page = chart.read_text()
    assert page.count("<circle") == len(found)
    assert "http" not in page.replace("http-equiv", "")
    assert plan(folder, *sweep, "--chart", str(chart)) == 2
    assert "--force" in capsys.readouterr().err


def test_what_nobody_reaches_is_3(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--target", "1000000tok/s", "--prompt", "16", "--generate", "8"]) == 3
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split()[0] == "machine"
    assert all("too slow" in row or "does not fit" in row for row in rows[1:])
    assert main(["plan", str(folder), "--target", "5tok/s", "--prompt", "16", "--generate", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    prices = [each["price_usd"] for each in found if each["reaches"]]
    assert prices == sorted(prices)


def test_what_does_not_fit_is_3_and_says_what_would(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder, "--generate", "8", "--max-memory", "host=1MiB") == 3
    error = capsys.readouterr().err
    assert "needs at least" in error
    assert "more RAM" not in error  # a budget was what was too small
    small = {**MACHINE, "cpu": {**MACHINE["cpu"], "memory_gb": 2.2}}
    (folder / "small.json").write_text(json.dumps(small))
    asked = ["plan", str(folder), "--hardware", str(folder / "small.json"), "--prompt", "16", "--generate", "8"]
    assert main(asked) == 3
    assert "GiB more RAM would make it fit" in capsys.readouterr().err


def test_a_plan_is_saved_and_a_run_is_written_as_a_profile(folder: Path, tmp_path: Path) -> None:
    saved, profile = tmp_path / "plan.json", tmp_path / "run.prof"
    options = ("--generate", "8", "--max-memory", "host=16MiB", "--save", str(saved), "--profile", str(profile))
    assert plan(folder, *options) == 0
    assert read_plan(saved).host_budget_nbytes == 16 * 2**20
    assert main(["prof", "stats", str(profile)]) == 0


def test_a_workload_file_says_what_is_to_be_done(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work.json"
    work.write_text(json.dumps({"kind": "run", "prompt": 32, "generate": 4, "batch": 2}))
    model = str(folder / "config.json")
    asked = ["plan", "--model", model, "--hardware", str(folder / "machine.json"), "--workload", str(work), "--json"]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["generate"], found["batch"]) == (32, 4, 2)
    work.write_text(json.dumps({"kind": "finetune", "batch": 2}))
    assert main(asked) == 2
    assert "--train adamw" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sweep", "host=8GiB"), "host=16GiB:128GiB"),
        (("--sweep", "colour=1:2"), "host=16GiB:128GiB"),
        (("--sweep", "host=8GiB:4GiB"), "below the last one"),
        (("--sweep", "batch=1:x"), "batch=1:64"),
        (("--chart", "x.html"), "add for example --sweep"),
        (("--throughput", "--batch", "2"), "leave --batch out"),
        (("--prompt", "600"), "512 positions"),
        (("--hardware", "nowhere"), "is no file and no machine known here"),
        (("--system", "nobody"), "nobody"),
        (("--sizes",), "--sizes and --hardware exclude each other"),
        (("--target", "5tok/s"), "--target and --hardware exclude"),
        (("--sweep", "host=1MiB:2MiB", "--save", "x.json"), "--sweep and --save exclude"),
        (("--device", "cpu"), "--hardware and --device exclude"),
        (("--max-memory", "device=1GiB"), "has no GPU"),
        (("--max-memory", "host=500GiB"), "is more than there is"),
    ],
)
def test_usage(folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str) -> None:
    assert plan(folder, *options) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert words in error
    assert "Traceback" not in error


def test_targets_are_rates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("fast", "-1tok/s", "5"):
        assert main(["plan", str(folder), "--target", text]) == 2
        assert "write for example 5tok/s" in capsys.readouterr().err


def test_sweeps_go_up_by_a_constant_factor() -> None:
    assert parse_sweep("batch=1:64") == Sweep(name="batch", values=(1, 2, 4, 8, 16, 32, 64))
    values = parse_sweep("host=16GiB:128GiB").values
    assert (values[0], values[-1], len(values)) == (16 * 2**30, 128 * 2**30, 7)
    factors = [b / a for a, b in itertools.pairwise(values)]
    assert factors == pytest.approx([2**0.5] * 6)
    with pytest.raises(UsageError):
        parse_sweep("device=1GiB:")
