"""What is foreseen of a run is what the run then does: the same homes, rings, shares and bytes."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from zoo.finetune import write_checkpoint, write_rows

import penstock
from penstock.cli import main
from penstock.memory.capacity import disk_capacity
from penstock.memory.errors import DoesNotFitError
from penstock.memory.store import stats
from penstock.runtime.foresight import Foresight, Room
from penstock.runtime.training import loads, room, selection
from penstock.runtime.training.forecast import TrainingForesight
from penstock.runtime.training.foreseen import Adapters, TrainingWork
from penstock.runtime.training.shards import ELEMENTS
from penstock.scheduler.datasheet import parse_hardware
from penstock.scheduler.hardware import Hardware
from penstock.scheduler.plan import Links

MIB = 2**20
MACHINE: dict[str, Any] = {
    "name": "paper",
    "cpu": {
        "name": "a CPU", "cores": 8, "memory_gb": 16, "bandwidth_gb_per_s": 20, "tflops": {"float32": 0.5},
        "launch_us": 1,
    },
    "drives": [{"name": "a drive", "read_gb_per_s": 0.2, "write_gb_per_s": 0.1}],
}  # fmt: skip


def hardware(read: float = 0.2e9) -> Hardware:
    """A machine whose drive reads so many bytes per second, which blocks are cut by."""
    drive = {**MACHINE["drives"][0], "read_gb_per_s": read / 1e9}
    return parse_hardware(json.dumps({**MACHINE, "drives": [drive]}), where="paper")


@pytest.fixture(autouse=True)
def user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")
    for place in ("finetuning.kept_machine", "finetune_outlook.kept_machine", "finetune_outlook.find_machine"):
        monkeypatch.setattr(f"penstock.cli.{place}", lambda *_, **__: hardware())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), hidden_size=128, intermediate_size=256, layers=4)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "zen.jsonl")


def command(checkpoint: Path, rows: Path, out: Path, *options: str) -> list[str]:
    asked = ["finetune", str(checkpoint), "--data", str(rows), "--out", str(out), "--seq", "64", "--device", "cpu"]
    return [*asked, "--json", *options]


def needed(training: TrainingForesight, work: TrainingWork) -> int:
    with pytest.raises(DoesNotFitError) as raised:
        training.forecast(hardware(), work, room=Room(host=MIB // 4))
    assert raised.value.needed_nbytes is not None
    return raised.value.needed_nbytes


@pytest.mark.parametrize(
    ("more", "options"),
    [
        (0, {}),
        (MIB // 4, {}),
        (MIB, {"accumulate": 2}),
        (3 * MIB, {}),
        (64 * MIB, {}),
        (MIB, {"updates": "backward"}),
        (MIB // 2, {"rank": 4}),
        (64 * MIB, {"rank": 4, "accumulate": 2}),
    ],
)
def test_what_prepare_decides_is_foreseen(checkpoint: Path, tmp_path: Path, more: int, options: dict[str, Any]) -> None:
    rank, accumulate, updates = (options.get(k, d) for k, d in (("rank", 0), ("accumulate", 1), ("updates", "step")))
    adapters = Adapters(rank=rank) if rank else None
    choice = penstock.AdamW()
    training = TrainingForesight(Foresight(checkpoint), adapters=adapters)
    work = TrainingWork(choice=choice, batch=2, context=64, accumulate=accumulate, updates=updates, adapters=adapters)
    host = needed(training, work) + more
    lora = None
    if rank:
        peft = pytest.importorskip("peft", reason="adapters are PEFT's, which is optional")
        lora = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model, optimizer = penstock.prepare(
        checkpoint, optimizer=choice, disk=tmp_path / "run", lora=lora, max_memory={"host": host}, device="cpu",
        accumulate=accumulate, updates=updates, context=64, batch=2,
    )  # fmt: skip
    try:
        plan = model.penstock.plan
        found = training.forecast(hardware(plan.links.disk_read), work, room=Room(host=host))
        assert [(b.home, b.nbytes) for b in found.plan.blocks] == [(b.home, b.nbytes) for b in plan.blocks]
        assert [b.slot_nbytes for b in found.plan.blocks] == [b.slot_nbytes for b in plan.blocks]
        assert (found.plan.slots, found.plan.slot_nbytes) == (plan.slots, plan.slot_nbytes)
        assert found.plan.host_nbytes == plan.host_nbytes
        assert found.plan.notes == plan.notes
        assert found.recompute == any("layers make theirs again" in note for note in plan.notes)
        assert found.wear == optimizer.training.wear()
        assert found.disk_nbytes == stats(tmp_path / "run" / "states").file_nbytes
    finally:
        penstock.close(model)


def beside_a_device(links: Links) -> Hardware:
    """The same machine with a device apart, an emulated one, and with a plan's rates, which blocks are cut by."""
    gpu = {"name": "a GPU", "memory_gb": 4, "bandwidth_gb_per_s": 200, "tflops": {"float32": 5}, "launch_us": 1}
    drive = {**MACHINE["drives"][0], "read_gb_per_s": (links.disk_read or 2e9) / 1e9}
    link = {"h2d_gb_per_s": (links.h2d or 2e10) / 1e9}
    made = {**MACHINE, "drives": [drive], "gpu": gpu, "link": link}
    return msgspec.structs.replace(parse_hardware(json.dumps(made), where="paper"), emulated=True)


@pytest.mark.parametrize(
    ("there", "more", "options"),
    [
        (64 * MIB, 0, {}),
        (64 * MIB, MIB, {}),
        (64 * MIB, 64 * MIB, {"updates": "backward"}),
        (MIB // 4, MIB // 4, {}),
        (MIB // 4, MIB, {"accumulate": 2}),
        (MIB // 4, MIB, {"updates": "backward"}),
        (MIB // 4, 64 * MIB, {"accumulate": 2, "updates": "backward"}),
    ],
)
def test_what_prepare_decides_beside_a_device_apart_is_foreseen(
    checkpoint: Path, tmp_path: Path, there: int, more: int, options: dict[str, Any]
) -> None:
    choice = penstock.AdamW()

    def ask(memory: dict[str, int]) -> Any:
        return penstock.prepare(
            checkpoint, optimizer=choice, disk=tmp_path / "run", max_memory=memory, device="emulated", context=64,
            batch=2, **options,
        )  # fmt: skip

    memory = {"device": 1, "host": 1024 * MIB}
    for tier, beyond in (("device", there), ("host", more)):
        with pytest.raises(DoesNotFitError) as raised:
            ask({**memory, tier: 1})
        assert raised.value.tier == tier
        memory[tier] = (raised.value.needed_nbytes or 0) + beyond
    model, optimizer = ask(memory)
    try:
        plan, back = model.penstock.plan, model.penstock.machinery.back
        work = TrainingWork(choice=choice, batch=2, context=64, **options)
        training = TrainingForesight(Foresight(checkpoint), adapters=None)
        found = training.forecast(beside_a_device(plan.links), work, room=Room(**memory))
        assert [(b.home, b.nbytes) for b in found.plan.blocks] == [(b.home, b.nbytes) for b in plan.blocks]
        assert {b.id for b in found.load.blocks.values() if b.in_memory} == set(back.permanent)
        assert [b.slot_nbytes for b in found.plan.blocks] == [b.slot_nbytes for b in plan.blocks]
        assert (found.plan.slots, found.plan.slot_nbytes) == (plan.slots, plan.slot_nbytes)
        assert (found.plan.host_slots, found.plan.host_slot_nbytes) == (plan.host_slots, plan.host_slot_nbytes)
        assert (found.plan.device_nbytes, found.plan.host_nbytes) == (plan.device_nbytes, plan.host_nbytes)
        where = [[note for note in each.notes if not note.startswith("updates on")] for each in (found.plan, plan)]
        assert where[0] == where[1]
        assert found.wear == optimizer.training.wear()
    finally:
        penstock.close(model)


@pytest.mark.parametrize(("more", "elements"), [(MIB // 8, ELEMENTS), (MIB, 4096)])
@pytest.mark.parametrize(("accumulate", "updates"), [(1, "step"), (2, "step"), (1, "backward"), (2, "backward")])
def test_bytes_of_steps_are_those_foreseen(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int, elements: int, accumulate: int,
    updates: Any,
) -> None:  # fmt: skip
    for user in (loads, room, selection):  # of short shards some gradients go to disk, beside what they pass through
        monkeypatch.setattr(user, "ELEMENTS", elements)
    choice = penstock.AdamW(max_grad_norm=1.0 if updates == "step" else None)
    training = TrainingForesight(Foresight(checkpoint), adapters=None)
    work = TrainingWork(
        choice=choice, batch=1, context=64, accumulate=accumulate, updates=updates, activations="recompute"
    )
    host = needed(training, work) + more
    found = training.forecast(hardware(), work, room=Room(host=host))
    model, optimizer = penstock.prepare(
        checkpoint, optimizer=choice, disk=tmp_path / "run", max_memory={"host": host}, device="cpu",
        accumulate=accumulate, updates=updates, activations="recompute",
    )  # fmt: skip
    ids = torch.randint(0, 200, (1, 64), generator=torch.Generator().manual_seed(0))
    try:
        moved = []
        for _ in range(12):
            for _ in range(accumulate):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.training.finish()
            statistics = model.penstock.statistics()
            moved.append((statistics.disk_read_nbytes, statistics.disk_written_nbytes))
    finally:
        penstock.close(model)
    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(moved[3:])]
    traffic = found.prediction.traffic
    assert traffic.weights_read
    assert (traffic.gradients_written > 0) == (elements == 4096 and (updates == "step" or accumulate > 1))
    assert {written for _, written in steps} == {found.wear.step_nbytes} == {round(traffic.written)}
    usual, _ = Counter(read for read, _ in steps).most_common(1)[0]
    largest = max(block.read_nbytes for block in found.load.blocks.values() if block.home == "disk")
    if updates == "step":  # a read that is late may spare another one, on a busy machine in most steps
        assert 0 <= round(traffic.read) - usual <= largest
    else:  # which blocks are being updated when a slot becomes free, and cannot be read ahead, is a matter of time
        assert usual == pytest.approx(traffic.read, abs=(found.load.behind + 1) * largest)


def test_a_dry_run_tells_and_leaves_nothing(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(command(checkpoint, rows, out, "--dry-run", "--epochs", "2", "--max-memory", "host=64MiB")) == 0
    found = capsys.readouterr()
    assert not out.exists()
    document = json.loads(found.out)
    assert document["forecast"]["s_per_step"] > 0
    assert document["steps"] == document["training"]["steps"] > 1
    assert "foreseen: " in found.err
    assert "bound by the" in found.err
    assert "wear of the drives" in found.err
    assert main(command(checkpoint, rows, out, "--dry-run", "--max-memory", "host=1MiB")) == 3
    found = capsys.readouterr()
    assert "needs at least" in found.err
    assert "--lora r=16 trains adapters instead" in found.err
    assert not out.exists()


def test_a_run_says_before_it_begins_what_it_is_foreseen_to_take(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--steps", "2", "--max-memory", "host=64MiB")
    assert main(command(checkpoint, rows, tmp_path / "run", *asked)) == 0
    ran = capsys.readouterr()
    assert ran.err.index("foreseen: ") < ran.err.index("2 steps in ")
    assert main(command(checkpoint, rows, tmp_path / "dry", "--dry-run", *asked)) == 0
    dry = capsys.readouterr()
    told, foreseen = json.loads(ran.out), json.loads(dry.out)
    assert told["training"] == foreseen["training"]
    for each in (told["forecast"], foreseen["forecast"]):
        each.pop("activations")
    assert told["forecast"] == foreseen["forecast"]


def test_without_a_calibration_a_run_begins_all_the_same(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.cli.finetuning.kept_machine", lambda *_, **__: None)
    assert main(command(checkpoint, rows, tmp_path / "run", "--steps", "1", "--max-memory", "host=64MiB")) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["forecast"] is None
    assert "run `penstock calibrate` once" in found.err


def test_a_mixture_of_experts_in_full_precision_is_foreseen(tmp_path: Path) -> None:
    """torch's kernel on tensors without values takes bfloat16 only."""
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=128, dtype=torch.float32,
    )  # fmt: skip
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path)
    program = TrainingForesight(Foresight(tmp_path), adapters=None).program(1, 16)
    experts = [each for each in program.events if getattr(each, "kind", "") == "linear" and each.nbytes >= 32 * 48 * 4]
    assert len(experts) >= 4  # two products of each layer


@pytest.mark.parametrize("dry", [False, True])
def test_a_forward_that_asks_for_values_is_trained_and_not_foreseen(
    checkpoint: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, dry: bool
) -> None:
    def ask(*_: object) -> None:
        raise RuntimeError("data-dependent")

    monkeypatch.setattr("penstock.runtime.training.forecast.training_program", ask)
    options = ["--steps", "1", "--max-memory", "host=1GiB", *(["--dry-run"] if dry else [])]
    code = main(command(checkpoint, rows, tmp_path / "run", *options))
    told = " ".join(capfd.readouterr().err.split())
    assert code == (2 if dry else 0)
    assert "asks for values (RuntimeError: data-dependent)" in told


def test_no_fault_of_foreseeing_ends_a_run(
    checkpoint: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("penstock.cli.finetuning.foresee", fail)
    assert main(command(checkpoint, rows, tmp_path / "run", "--steps", "1")) == 0


def test_a_drive_that_is_too_full_is_told_before_the_run(
    checkpoint: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    full = disk_capacity(tmp_path)
    monkeypatch.setattr(
        "penstock.cli.finetune_outlook.disk_capacity", lambda _: dataclasses.replace(full, free_nbytes=MIB)
    )
    asked = command(checkpoint, rows, tmp_path / "run", "--steps", "1", "--max-memory", "host=1GiB", "--dry-run")
    assert main(asked) == 3
    assert "room for 0.00 GiB: free space there" in " ".join(capfd.readouterr().err.split())
