"""`penstock finetune` on a tiny model: the losses of a run in memory, through kills, signals and evaluation."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo.finetune import write_checkpoint, write_rows, zen

import penstock
from penstock.cli import main
from penstock.runtime.training.data.dataset import DataOptions, open_data
from penstock.runtime.training.evaluation import model_inputs, takes_positions
from penstock.runtime.training.schedule import Schedule

BUDGET = "host=15MiB"
"""Under which the tiny model streams, with two backward passes a step."""
COMMON = ("--seq", "64", "--batch", "2", "--lr", "3e-3", "--device", "cpu", "--max-memory", BUDGET)


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits depend on how many threads compute; and two on two busy cores wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), attention_dropout=0.1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "zen.jsonl")


def command(checkpoint: Path, rows: Path, out: Path, *options: str) -> list[str]:
    return ["finetune", str(checkpoint), "--data", str(rows), "--out", str(out), *COMMON, *options]


def steps(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def told(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must not depend on how often a run was killed."""
    names = ("step", "loss", "lr", "gradient_norm", "tokens", "loss_tokens", "seen_tokens", "eval_loss")
    return [tuple(record.get(name) for name in names) for record in records]


def ended(arguments: list[str], errors: Path) -> None:
    """What a process does that is started here: the command, with its exit code."""
    torch.set_num_threads(1)
    os.environ.pop("PENSTOCK_DEBUG", None)
    with errors.open("w") as sys.stderr:
        sys.exit(main(arguments))


def start(arguments: list[str], errors: Path) -> BaseProcess:
    """A process of its own, forked from one that has imported torch already, and done nothing else with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["penstock.cli.finetuning"])
    process = context.Process(target=ended, args=(arguments, errors))
    process.start()
    return process


def signalled(process: BaseProcess, out: Path, step: int, number: signal.Signals) -> int | None:
    """Send a signal once this step is written down, and wait for the end; the exit code."""
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_bytes().count(b"\n") >= step:
            break
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    code = process.exitcode
    process.close()
    return code


def test_losses_are_those_of_a_run_in_memory(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against plain PyTorch: an fp32 master of each parameter, torch's AdamW, clipping and accumulation."""
    count, accumulate, lr = 6, 2, 3e-3
    recipe = ("--schedule", "cosine", "--warmup", "2", "--accumulate", str(accumulate), "--seed", "5", "--clip", "0.7")
    assert main(command(checkpoint, rows, tmp_path / "run", "--steps", str(count), *recipe, "--json")) == 0
    out, error = capsys.readouterr()
    document = json.loads(out)
    for words in ("plan for", "with adamw", "no weight decay for", "written per step", "step 6/6", "loss.svg"):
        assert words in error

    data = open_data(rows, AutoTokenizer.from_pretrained(checkpoint), folder=tmp_path / "data",
                     options=DataOptions(seq=64, seed=5))  # fmt: skip
    batches = data.batches(batch=2, accumulate=accumulate)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    model.train()
    torch.manual_seed(5)
    masters = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
    matrices = [master for master in masters if master.dim() > 1]
    vectors = [master for master in masters if master.dim() == 1]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.01}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    schedule = Schedule(kind="cosine", steps=count, warmup=2)
    expected = []
    for step in range(count):
        for master in masters:
            master.grad = torch.zeros_like(master)
        given, loss_of_step = batches.step(), 0.0
        for batch in given:
            share = batch.loss_tokens / sum(each.loss_tokens for each in given)
            loss = model(**model_inputs(model, batch)).loss * share
            loss.backward()
            loss_of_step += loss.item()
            for master, parameter in zip(masters, model.parameters(), strict=True):
                assert master.grad is not None
                assert parameter.grad is not None
                master.grad += parameter.grad.float()
                parameter.grad = None
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule.factor(step)
        norm = torch.nn.utils.clip_grad_norm_(masters, 0.7)
        optimizer.step()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            parameter.data.copy_(master.data)
        expected.append((loss_of_step, norm.item()))
    assert [(each["loss"], each["gradient_norm"]) for each in steps(tmp_path / "run")] == expected

    assert (document["step"], document["taken"]) == (count, count)
    assert document["last"]["loss"] == expected[-1][0]
    assert document["training"]["parameters"] == sum(master.numel() for master in masters)
    assert document["plan"]["resident"] is False
    again, optimizer_again = penstock.resume(tmp_path / "run", max_memory={"host": "15MiB"}, device="cpu")
    try:
        again.train(False)
        model.train(False)
        with torch.no_grad():
            assert torch.equal(again(given[0].input_ids).logits, model(given[0].input_ids).logits)
        assert optimizer_again.extra["step"] == count
    finally:
        penstock.close(again)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
def test_adapters_are_those_of_peft_in_memory(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--lora`, in one go and in two, against plain PyTorch and PEFT; then the folder that PEFT loads."""
    count, lr = 6, 3e-3
    recipe = ("--schedule", "constant", "--accumulate", "2", "--seed", "5", "--clip", "0.7")
    lora: tuple[str, ...] = ("--lora", "r=4,dropout=0.1,targets=q_proj+down_proj")
    assert main(command(checkpoint, rows, tmp_path / "no", *recipe, *lora, "--max-memory", "host=1KiB")) == 3
    needed = re.search(r"at least (\d+) bytes", capsys.readouterr().err)
    assert needed is not None
    lora += ("--max-memory", f"host={-(-int(needed[1]) // 1024)}KiB")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(command(checkpoint, rows, whole, "--steps", str(count), *recipe, *lora, "--json")) == 0
    out, error = capsys.readouterr()
    for words in ("adapters: r=4,alpha=8,dropout=0.1,targets=q_proj+down_proj", "written per commit", "step 6/6"):
        assert words in error
    assert main(command(checkpoint, rows, broken, "--steps", "4", *recipe, *lora)) == 0
    assert main(command(checkpoint, rows, broken, "--steps", str(count), *recipe, "--resume")) == 2
    assert "lora was r=4,alpha=8,dropout=0.1,targets=q_proj+down_proj and is not set" in capsys.readouterr().err
    assert main(command(checkpoint, rows, broken, "--steps", str(count), *recipe, *lora, "--resume")) == 0
    assert told(steps(broken)) == told(steps(whole))

    data = open_data(rows, AutoTokenizer.from_pretrained(checkpoint), folder=tmp_path / "data",
                     options=DataOptions(seq=64, seed=5))  # fmt: skip
    batches = data.batches(batch=2, accumulate=2)
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config).train()
    assert takes_positions(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    torch.manual_seed(5)
    expected = []
    for _ in range(count):
        given, loss_of_step = batches.step(), 0.0
        for batch in given:
            share = batch.loss_tokens / sum(each.loss_tokens for each in given)
            loss = model(**model_inputs(model, batch)).loss * share
            loss.backward()
            loss_of_step += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.7)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((loss_of_step, norm.item()))
    assert [(each["loss"], each["gradient_norm"]) for each in steps(whole)] == expected

    document = json.loads(out)
    assert document["training"]["parameters"] == sum(parameter.numel() for parameter in trained)
    assert document["training"]["step_written_nbytes"] == 0
    assert document["disk_written_nbytes"] == document["training"]["commit_written_nbytes"]  # one, at the end
    assert document["plan"]["resident"] is False
    assert main(["store", "export", str(broken), str(tmp_path / "out")]) == 0
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto"), tmp_path / "out"
    )
    found = [parameter for name, parameter in again.named_parameters() if "lora_" in name]
    assert all(torch.equal(one, other) for one, other in zip(found, trained, strict=True))


def test_a_run_that_is_killed_goes_on_with_the_same_bits(checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    """kill -9 at random steps, then with --resume to the end: every loss is that of a run which nobody disturbed."""
    recipe = (
        "--steps",
        "40",
        "--accumulate",
        "2",
        "--commit-every",
        "3",
        "--eval-fraction",
        "0.2",
        "--eval-every",
        "7",
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(command(checkpoint, rows, whole, *recipe)) == 0
    draw = random.Random(os.urandom(8))
    at = sorted(draw.sample(range(1, 23), 4))
    print(f"killed after steps {at}")
    for step in at:
        process = start(command(checkpoint, rows, broken, *recipe, "--resume"), tmp_path / "errors")
        assert signalled(process, broken, step, signal.SIGKILL) == -signal.SIGKILL
        assert told(steps_but_torn(broken)) == told(steps(whole))[: len(steps_but_torn(broken))]
    assert main(command(checkpoint, rows, broken, *recipe, "--resume")) == 0
    assert told(steps(broken)) == told(steps(whole))
    assert any(each.get("eval_loss") for each in steps(whole))


def steps_but_torn(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_commits_and_ends(
    checkpoint: Path, rows: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    recipe = ("--steps", "400", "--commit-every", "400", "--accumulate", "2")
    process = start(command(checkpoint, rows, run, *recipe), tmp_path / "errors")
    found = signalled(process, run, 3, number)
    error = (tmp_path / "errors").read_text()
    assert found == code, error
    done = len(steps(run))
    assert f"told to stop: committed at step {done} of 400; --resume goes on there" in error
    assert ("interrupted" in error) == (number == signal.SIGINT)
    ElementTree.fromstring((run / "loss.svg").read_text())
    assert not (run / "penstock-run.lock").exists()


def test_a_run_is_gone_on_with_only_when_asked_and_as_it_began(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    longer = ("--schedule", "constant", "--commit-every", "2")
    assert main(command(checkpoint, rows, run, "--steps", "2", *longer, "--resume")) == 0
    assert "no commit to go on from: starting afresh" in capsys.readouterr().err
    assert main(command(checkpoint, rows, run, "--steps", "2", *longer)) == 2
    assert "--resume goes on with it, --force takes it away" in capsys.readouterr().err
    assert main(command(checkpoint, rows, run, "--steps", "2", *longer, "--resume", "--json")) == 0
    out, error = capsys.readouterr()
    assert "all 2 steps are done already" in error
    assert json.loads(out)["step"] == 2
    assert main(command(checkpoint, rows, run, "--steps", "3", *longer, "--resume", "--weight-decay", "0.5")) == 2
    assert "weight-decay was 0.01 and is 0.5" in capsys.readouterr().err
    assert main(command(checkpoint, rows, run, "--steps", "3", *longer, "--resume")) == 0
    assert "2 steps are done: going on behind them" in capsys.readouterr().err
    assert [each["step"] for each in steps(run)] == [1, 2, 3]
    kept = steps(run)
    assert main(command(checkpoint, rows, run, "--steps", "3", *longer, "--force")) == 0
    assert told(steps(run)) == told(kept)


def test_a_small_model_learns_the_zen_of_python(tmp_path: Path) -> None:
    """Bytes, from chance (ln 257 = 5.5) to below 1.5 nats in 120 steps."""
    folder = write_checkpoint(tmp_path / "tiny", layers=2)
    text = tmp_path / "zen.txt"
    text.write_text(zen())
    options = ("--steps", "120", "--batch", "4", "--seq", "128", "--lr", "1e-2", "--warmup", "5")
    assert main(command(folder, text, tmp_path / "run", *options)) == 0
    losses = [each["loss"] for each in steps(tmp_path / "run")]
    assert losses[0] > 5
    assert sum(losses[-5:]) / 5 < 1.5
    best = list(itertools.accumulate(losses, min))
    assert best[60] < best[20] < best[5]
