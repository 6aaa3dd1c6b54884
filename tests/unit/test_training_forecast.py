"""`penstock plan --train`: a model's own code, the planner and the simulated step together, on machines from files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli_forecast import MACHINE
from test_predicted_profile import CONFIG

from penstock.cli import main
from penstock.memory.errors import DoesNotFitError, UsageError
from penstock.runtime import planning
from penstock.runtime.adapterbones import add_adapters
from penstock.runtime.foresight import Foresight, Room
from penstock.runtime.pretrained import outline
from penstock.runtime.programs import training_program
from penstock.runtime.rehearsal import make_fake
from penstock.runtime.training import forecast as forecast_module
from penstock.runtime.training.adapters import changing_on
from penstock.runtime.training.adapters import put as put_adapters
from penstock.runtime.training.forecast import TrainingForesight
from penstock.runtime.training.foreseen import Adapters, TrainingForecast, TrainingWork
from penstock.runtime.training.loads import update_work
from penstock.runtime.training.optimizers import SGD, AdamW, Lion
from penstock.runtime.training.weighed import weighing
from penstock.scheduler.datasheet import parse_hardware
from penstock.scheduler.hardware import Hardware
from penstock.scheduler.sizes import Workload
from penstock.scheduler.weighing import Before, Dear, Part, Weighing

MIB = 2**20
GPU: dict[str, Any] = {
    "gpu": {
        "name": "a GPU", "memory_gb": 1.0, "bandwidth_gb_per_s": 200, "tflops": {"float32": 5}, "launch_us": 1,
    },
    "link": {"h2d_gb_per_s": 2},
}  # fmt: skip
WORK = TrainingWork(choice=AdamW(max_grad_norm=1.0), batch=2, context=32)


@pytest.fixture(autouse=True)
def user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG", raising=False)  # which would have errors shown with tracebacks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps({**CONFIG, "dtype": "bfloat16", "num_hidden_layers": 4}))
    (path / "machine.json").write_text(json.dumps(MACHINE))
    (path / "gpu.json").write_text(json.dumps({**MACHINE, **GPU}))
    return path


@pytest.fixture(scope="module")
def foresight(folder: Path) -> Foresight:
    return Foresight(folder)


@pytest.fixture(scope="module")
def training(foresight: Foresight) -> TrainingForesight:
    return TrainingForesight(foresight, adapters=None)


@pytest.fixture(scope="module")
def least(folder: Path, training: TrainingForesight) -> int:
    """MiB of host memory below which nothing can be trained."""
    with pytest.raises(DoesNotFitError) as raised:
        training.forecast(machine(folder), WORK, room=Room(host=MIB))
    assert raised.value.needed_nbytes is not None
    return -(-raised.value.needed_nbytes // MIB)


def machine(folder: Path, name: str = "machine.json") -> Hardware:
    return parse_hardware((folder / name).read_text(), where=name)


def test_room_goes_to_weights_then_gradients_then_states(folder: Path, training: TrainingForesight, least: int) -> None:
    hardware = machine(folder)
    shares = []
    read = []
    for host in (least, least + 2, least + 14, least + 40, least + 200):
        found = training.forecast(hardware, WORK, room=Room(host=host * MIB))
        trained = found.load.trained()
        shares.append(
            (
                sum(block.weights_nbytes for block in trained if block.home == "host") / (2 * found.trained),
                1 - sum(block.spilled_nbytes for block in trained) / (2 * found.trained),
                1 - sum(b.states_moved_nbytes for b in trained) / sum(b.states_nbytes for b in trained),
            )
        )
        read.append(found.prediction.traffic.read)
        assert found.plan.host_nbytes <= host * MIB
        own = found.load.held_nbytes("host") + sum(
            block.kept_nbytes - block.spilled_nbytes + block.states_nbytes - block.states_moved_nbytes
            for block in trained
        )
        assert own <= found.plan.host_nbytes
    weights, gradients, states = zip(*shares, strict=True)
    assert weights[0] < 1
    assert weights[-1] == gradients[-1] == states[-1] == 1
    assert gradients[0] == 1  # of a model this small they all fit where those of a larger one pass through
    assert states[0] < 0.9
    for share in (weights, gradients, states):
        assert [round(each, 2) for each in share] == sorted(round(each, 2) for each in share)
    assert read == sorted(read, reverse=True)
    assert read[-1] == 0


def test_bytes_per_parameter_are_those_of_the_page(folder: Path, training: TrainingForesight, least: int) -> None:
    streamed = training.forecast(machine(folder), WORK, room=Room(host=(least + 1) * MIB))
    traffic, count = streamed.prediction.traffic, streamed.trained
    assert streamed.recompute
    on_disk = sum(block.elements for block in streamed.load.trained() if block.home == "disk")
    spilled = sum(block.spilled_nbytes for block in streamed.load.trained())
    assert 0 < on_disk < count
    assert traffic.weights_written == pytest.approx(2 * on_disk, rel=0.02)  # whole pages
    assert traffic.gradients_written == pytest.approx(spilled)
    assert traffic.gradients_read == pytest.approx(spilled)
    states = sum(block.states_moved_nbytes for block in streamed.load.trained())
    assert 0 < traffic.states_read == pytest.approx(states)
    assert traffic.states_written == pytest.approx(states)
    assert sum(block.states_nbytes for block in streamed.load.trained()) == pytest.approx(12 * count, rel=0.01)
    assert streamed.disk_nbytes == pytest.approx(24 * count, rel=0.01)  # arrays begin on pages
    assert streamed.wear.step_nbytes == pytest.approx(traffic.written)


def test_activations_have_room_before_weights_where_the_drive_has_time(
    folder: Path, training: TrainingForesight, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forecast(step: Weighing | None) -> TrainingForecast:
        monkeypatch.setattr(forecast_module, "weighing", lambda *_, **__: step)
        return training.forecast(machine(folder), WORK, room=Room(host=(least + 6) * MIB))

    plain = forecast(None)
    part = Part(compute_s=10.0, drive_s=0.0, weight_byte_s=1e-9)
    step = Weighing(dear=[Dear(nbytes=4 * MIB, seconds=5.0)], part=part)
    found = forecast(step)
    assert found.plan.disk_nbytes_per_sweep > plain.plan.disk_nbytes_per_sweep
    assert found.room.activations_nbytes >= 4 * MIB
    assert found.plan.host_nbytes <= (least + 6) * MIB
    assert any(note.startswith("room: activations have 4.00 MiB before weights") for note in found.plan.notes)
    assert forecast(replace(step, part=replace(part, drive_s=15.0))).plan == plain.plan


@pytest.mark.parametrize(
    ("tflops", "read", "updates", "more", "held"),
    [
        (0.08, 2.0, "step", 90, True),  # all weights would stay, and some stream
        (0.08, 2.0, "backward", 60, True),
        (0.5, 0.2, "step", 60, False),  # the drive is the bound
    ],
)
def test_no_other_room_makes_the_step_that_is_foreseen_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tflops: float, read: float, updates: Any, more: int, held: bool
) -> None:
    sizes = {"num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16}
    config = {**CONFIG, **sizes, "num_key_value_heads": 16, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    training = TrainingForesight(Foresight(tmp_path), adapters=None)
    drive = {**MACHINE["drives"][0], "read_gb_per_s": read, "write_gb_per_s": read / 2}
    paper = {**MACHINE, "cpu": {**MACHINE["cpu"], "tflops": {"float32": tflops}}, "drives": [drive]}
    hardware = parse_hardware(json.dumps(paper), where="paper")
    clip = 1.0 if updates == "step" else None
    work = TrainingWork(choice=AdamW(max_grad_norm=clip), batch=4, context=256, updates=updates)
    with pytest.raises(DoesNotFitError) as raised:
        training.forecast(hardware, work, room=Room(host=MIB))
    room = Room(host=(raised.value.needed_nbytes or 0) + more * MIB)
    chosen = training.forecast(hardware, work, room=room)
    tried = []
    for part in range(5):

        def forced(step: Weighing, place: Any, part: int = part) -> Before | None:
            nbytes = part * sum(each.nbytes for each in step.dear) // 4
            fits = place(nbytes) is not None
            return Before(nbytes=nbytes, seconds=0.0, without_s=0.0) if nbytes and fits else None

        monkeypatch.setattr(planning, "weigh", forced)
        tried.append(training.forecast(hardware, work, room=room).seconds)
    assert max(tried) > 1.05 * min(tried)  # it matters
    assert chosen.seconds <= 1.01 * min(tried)
    assert any(note.startswith("room: activations have") for note in chosen.plan.notes) == held


def test_what_is_dear_is_what_products_make(folder: Path, foresight: Foresight, training: TrainingForesight) -> None:
    options: dict[str, Any] = {"tokens": 64, "accumulate": 1}
    saves = training.saves(2, 32)
    step = weighing(foresight.model, saves, machine(folder), AdamW(), **options, early=True)
    assert step is not None
    layers = foresight.model.get_submodule("model.layers").named_modules()
    outputs = sum(
        each.out_features
        for name, each in layers
        if isinstance(each, torch.nn.Linear) and not name.endswith("down_proj")  # a layer's last, never made again
    )
    assert sum(each.nbytes for each in step.dear) == 64 * 2 * outputs
    assert step.again_s(0) > step.again_s(step.rooms()[-1]) == 0
    uncounted = weighing(foresight.model, None, machine(folder), AdamW(), **options, early=True)
    assert uncounted is not None
    assert uncounted.dear == step.dear  # of a plain model the matrices say the same
    assert uncounted.part.compute_s < step.part.compute_s  # but for the output layer
    clipped = weighing(foresight.model, saves, machine(folder), AdamW(), **options, early=False)
    assert clipped is not None
    assert clipped.update is not None
    assert clipped.part.compute_s + clipped.update.compute_s == pytest.approx(step.part.compute_s)
    assert clipped.gradients_nbytes == sum(each.nbytes for each in foresight.model.parameters())
    assert step.gradients_nbytes == 0  # which are gone with their updates
    assert step.states_nbytes == clipped.states_nbytes == 6 * clipped.gradients_nbytes
    assert clipped.update.state_byte_s == step.part.state_byte_s
    assert clipped.part.weight_byte_s + clipped.update.weight_byte_s == pytest.approx(step.part.weight_byte_s)


def test_optimizers_differ_by_their_states(folder: Path, training: TrainingForesight) -> None:
    written = {}
    for choice in (AdamW(), Lion(), SGD(momentum=0.9), SGD()):
        work = TrainingWork(choice=choice, batch=2, context=32)
        found = training.forecast(machine(folder), work, room=Room(host=110 * MIB))
        written[choice] = found.disk_nbytes / found.trained
    assert list(written.values()) == pytest.approx([24, 16, 16, 8], rel=0.01)
    assert update_work(SGD()).nbytes < update_work(Lion()).nbytes < update_work(AdamW()).nbytes
    assert update_work(SGD()).operations == 3  # widen, add, round


def test_adapters_leave_the_base_as_it_is(folder: Path, foresight: Foresight) -> None:
    training = TrainingForesight(foresight, adapters=Adapters(rank=4))
    work = TrainingWork(choice=AdamW(), batch=2, context=32, adapters=Adapters(rank=4))
    found = training.forecast(machine(folder), work, room=Room(host=60 * MIB))
    per_layer = 4 * (4 * (256 + 256) + 3 * (256 + 1024))
    assert found.trained == 4 * per_layer
    assert found.prediction.traffic.written == 0
    assert found.wear.step_nbytes == 0
    assert found.wear.commit_nbytes == found.disk_nbytes / 2 >= 12 * found.trained
    few = TrainingForesight(foresight, adapters=Adapters(rank=4, targets=("q_proj", "v_proj")))
    assert sum(each.elements for each in few.trained) == 4 * 4 * 2 * 512
    with pytest.raises(UsageError, match="nothing would be trained"):
        TrainingForesight(foresight, adapters=Adapters(rank=4, targets=("nobody",)))
    # frozen products have one product in backward, trained ones two
    whole = TrainingForesight(foresight, adapters=None)
    learned = whole.program(2, 32).learned
    assert len(learned) == 4 * 7 + 1
    assert len(training.program(2, 32).learned) == 2 * 4 * 7


def test_adapters_are_those_of_peft(folder: Path) -> None:
    peft = pytest.importorskip("peft", reason="compares with PEFT, which is optional")
    for names, dropout in (((), 0.0), (("q_proj", "down_proj"), 0.1)):
        ours = outline(folder)
        make_fake(ours)
        made = add_adapters(ours, rank=4, targets=names, dropout=dropout)
        config = peft.LoraConfig(r=4, target_modules=list(names) or "all-linear", lora_dropout=dropout)
        adapted: Any = put_adapters(outline(folder), config)
        make_fake(adapted.get_base_model())
        sizes = Counter((tuple(p.shape), p.dtype) for n, p in adapted.named_parameters() if "lora_" in n)
        assert Counter((tuple(p.shape), p.dtype) for p in made) == sizes
        work = Workload(train="lora", batch=2, context=32)
        mine, his = (training_program(each, work).operations() for each in (ours, adapted.get_base_model()))
        assert Counter(mine) == Counter(his)


def test_blocks_of_a_frozen_base_are_those_of_prepare(folder: Path, foresight: Foresight) -> None:
    training = TrainingForesight(foresight, adapters=Adapters(rank=4))
    work = TrainingWork(choice=AdamW(), batch=2, context=32, adapters=Adapters(rank=4))
    hardware = machine(folder)
    with pytest.raises(DoesNotFitError) as raised:
        training.forecast(hardware, work, room=Room(host=MIB))
    needed = raised.value.needed_nbytes
    assert needed is not None
    found = training.forecast(hardware, work, room=Room(host=needed + 4 * MIB))
    wanted = changing_on(
        [each.parameter for each in training.trained], separate=False, emulated=False, arrays=3, accumulate=1
    )
    beside = found.plan.host_nbytes - sum(b.slot_nbytes for b in found.plan.blocks if b.home == "host")
    assert beside >= wanted.own_nbytes + found.plan.slots * found.plan.slot_nbytes
    assert {each.parameter.dtype for each in training.trained} == {torch.float32}
    assert found.plan.tables == ("model.embed_tokens.weight",)  # looked up row by row where it is frozen
    assert found.prediction.traffic.weights_read > 0
    again = training.forecast(hardware, replace(work, accumulate=3), room=Room(host=needed + 4 * MIB))
    assert again.prediction.traffic.weights_read == pytest.approx(3 * found.prediction.traffic.weights_read, rel=0.2)


def test_activations_made_again_take_less_memory_and_more_time(folder: Path, training: TrainingForesight) -> None:
    hardware = machine(folder)
    long = TrainingWork(choice=AdamW(), batch=8, context=256, activations="keep")
    kept = training.forecast(hardware, long)
    again = training.forecast(hardware, TrainingWork(choice=AdamW(), batch=8, context=256, activations="recompute"))
    assert again.activations_nbytes < kept.activations_nbytes
    assert again.prediction.busy_s["CPU"] > kept.prediction.busy_s["CPU"]
    assert kept.load.segments == ()
    assert len(again.load.segments) == 4


def test_a_device_apart_updates_on_the_cpu(folder: Path, training: TrainingForesight) -> None:
    found = training.forecast(machine(folder, "gpu.json"), WORK, room=Room(device=12 * MIB, host=300 * MIB))
    assert found.load.separate
    assert set(found.prediction.busy_s) >= {"GPU", "CPU", "host-to-device link", "device-to-host link"}
    assert found.prediction.traffic.from_device == 2 * found.trained


def test_a_fast_link_has_the_device_update_some(folder: Path, training: TrainingForesight) -> None:
    """All weights stay on the device, with homes in host memory, and so do all states: nothing moves over the drive."""
    asked = {**MACHINE, "gpu": {**GPU["gpu"], "memory_gb": 8.0}, "link": {"h2d_gb_per_s": 200}}
    hardware = parse_hardware(json.dumps(asked), where="fast")
    found = training.forecast(hardware, WORK, room=Room(device=1024 * MIB, host=1024 * MIB))
    there = sum(block.elements_there for block in found.load.trained())
    assert 0 < there < found.trained
    assert found.room.states_over_link_nbytes == pytest.approx(12 * there, rel=0.01)
    assert any("on the device, the rest on the CPU meanwhile" in note for note in found.plan.notes)
    traffic = found.prediction.traffic
    assert traffic.read == traffic.written == 0
    assert traffic.from_device == pytest.approx(2 * found.trained + 14 * there, rel=0.01)
    assert traffic.to_device == pytest.approx(2 * found.trained + 14 * there, rel=0.1)  # small tensors not the first
    less = training.forecast(hardware, WORK, room=Room(device=700 * MIB, host=1024 * MIB))
    assert not less.room.on_device


def test_a_drive_that_is_too_small_is_refused(folder: Path, training: TrainingForesight) -> None:
    small = {**MACHINE, "drives": [{**MACHINE["drives"][0], "capacity_tb": 0.0001}]}
    with pytest.raises(DoesNotFitError, match="twice, and scratch files"):
        training.forecast(parse_hardware(json.dumps(small), where="small"), WORK)


def plan(folder: Path, *options: str, name: str = "machine.json") -> int:
    asked = ["plan", str(folder), "--hardware", str(folder / name), "--seq", "32", *options]
    return main([*asked, *([] if "--train" in options else ["--train", "adamw"])])


def test_the_plan_for_people(folder: Path, least: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder, "--batch", "2", "--max-memory", f"host={least}MiB") == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert "training all weights with adamw, clipped, 1 × 2 sequences of 32 tokens per step" in out
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "masters, states" in lines["tier"]
    assert "device" not in lines
    assert "bound by the disk: per step disk" in out
    assert "600 TBW, if that is the drive's, are" in out
    assert "per 1000 steps" in out
    assert "activations of layers are made again in backward" in out
    assert f"--max-memory host={least}MiB" in out


def test_the_plan_for_programs_and_its_wear(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lasting = {**MACHINE, "drives": [{**MACHINE["drives"][0], "endurance_tbw": 300}]}
    (folder / "lasting.json").write_text(json.dumps(lasting))
    assert plan(folder, "--accumulate", "2", "--max-memory", "host=100MiB", "--json", name="lasting.json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens_per_s"] == pytest.approx(2 * 32 / found["s_per_step"])
    assert found["forward_s"] + found["backward_s"] + found["update_s"] == pytest.approx(found["s_per_step"])
    assert found["wear"]["endurance_nbytes"] == 300e12
    assert found["wear"]["steps_until"] == pytest.approx(300e12 / found["written_nbytes_per_step"])
    assert found["tiers"]["disk"]["states"] == pytest.approx(24 * found["trained_parameters"], rel=0.01)
    assert found["binds"] == max(found["busy_s_per_step"], key=found["busy_s_per_step"].get)


def test_no_clipping_lets_updates_begin_in_backward(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = {}
    for updates in ("step", "backward"):
        options = ("--no-clip", "--updates", updates, "--max-memory", "device=12MiB,host=400MiB", "--json")
        assert plan(folder, *options, name="gpu.json") == 0
        found = json.loads(capsys.readouterr().out)
        kept[updates] = found["tiers"]["host"]["gradients"]
        assert found["updates"] == updates
    assert kept == {"step": 2 * found["trained_parameters"], "backward": 0}


def test_sweeps_and_targets(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = tmp_path / "sweep.html"
    assert plan(folder, "--sweep", "host=100MiB:400MiB", "--json") == 0
    times = [each["s_per_step"] for each in json.loads(capsys.readouterr().out)]
    assert times == sorted(times, reverse=True)
    assert plan(folder, "--sweep", "batch=1:4", "--chart", str(chart)) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:3] == ["batch", "tokens/s", "s/step"]
    assert "tokens/s of training" in chart.read_text()
    asked = ["plan", str(folder), "--train", "adamw", "--seq", "32", "--target"]
    assert main([*asked, "1e-9s/step"]) == 3
    assert "too slow" in capsys.readouterr().out
    assert main([*asked, "1000s/step"]) == 0
    assert "yes" in capsys.readouterr().out
    assert main([*asked, "fast"]) == 2
    assert "write for example 5tok/s or 20s/step" in capsys.readouterr().err


def test_what_does_not_fit_says_what_would(folder: Path, least: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder, "--max-memory", f"host={least - 1}MiB") == 3
    error = capsys.readouterr().err
    assert "needs at least" in error
    assert "--lora r=16 would make it fit" in error
    small = {**MACHINE, "cpu": {**MACHINE["cpu"], "memory_gb": 3.0}}
    (folder / "small.json").write_text(json.dumps(small))
    assert plan(folder, "--batch", "512", "--no-recompute", name="small.json") == 3
    error = capsys.readouterr().err
    assert "or 16 GiB more RAM would make it fit" in error
    assert "--batch " in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--train", "adam"), "use adamw, sgd, lion or lora"),
        (("--updates", "later"), "use step or backward"),
        (("--updates", "backward"), "add --no-clip"),
        (("--lora", "rank=16"), "has no key 'rank'"),
        (("--lora", "r=0"), "no whole number above 0"),
        (("--lora", "r=4,r=5"), "gives r twice"),
        (("--lora", "r=4", "--no-clip", "--updates", "backward"), "those of adapters stay in memory"),
        (("--lora", "r=4", "--rank", "4"), "--lora and --rank exclude"),
        (("--prompt", "8"), "--train and --prompt exclude"),
        (("--generate", "8"), "--train and --generate exclude"),
        (("--force",), "none is written"),
        (("--top", "3"), "add --sizes"),
        (("--sweep", "batch=1:4", "--batch", "2"), "leave one of them out"),
        (("--sweep", "host=100MiB:400MiB", "--max-memory", "host=1GiB"), "leave one of them out"),
        (("--save", "x.json"), "--train and --save exclude"),
        (("--max-memory", "device=1GiB"), "has no GPU"),
        (("--batch", "0"), "--batch"),
    ],
)
def test_usage(folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str) -> None:
    assert plan(folder, *options) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert words in error
