"""What `penstock plan --train` predicts against what steps of training take, each predicted before it is run.

    python -m benchmarks.train_predictions --json steps.json
    python -m benchmarks.train_predictions --only 0:4 --json a.json     # in pieces
    python -m benchmarks.train_predictions --report a.json b.json

Random Llama-shaped models (vocabulary 8192, feed-forward 2.6875 x hidden, heads 64 wide) in bf16, 256 tokens per
sequence, AdamW. Each case runs in a process of its own: the machine is calibrated (quick: 5 s), the model is prepared
with the budget of the case, a few steps are taken, and the machine is calibrated again. The step is foreseen from the
config alone with either calibration, and the mean of the two is held against the shortest of the steps behind the first
ones, in which orders are learned: what processors do is calibrated as the best of several repetitions, since others who
use a machine are no property of it. The median of the steps is told beside. Nothing is fitted to the runs.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .contenders.training import moved
from .reference_checkpoint import default_folder
from .streams import Figure, Job, Runner, arguments_of, finish, main_or_worker, table

MEDIAN_GOAL, WORST_GOAL = 0.10, 0.25
LENGTH, STEPS, SKIPPED = 256, 8, 3
VOCABULARY = 8192
SHAPES = {"A": (12, 256), "B": (8, 512), "C": (8, 768)}
"""Layers and hidden size: 14, 35 and 69 million parameters."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train one model."""

    shape: str
    host_mib: int
    """Budget."""
    what: str
    """What the budget leaves outside memory, in words."""
    batch: int = 1
    accumulate: int = 1
    clip: bool = True
    early: bool = False
    """Updates begin in backward."""
    rank: int = 0
    """Of adapters; 0 trains all weights."""

    @property
    def name(self) -> str:
        """For the table."""
        layers, hidden = SHAPES[self.shape]
        words = [f"{layers} × {hidden}", self.what, f"{self.accumulate} × {self.batch}"]
        words += [f"LoRA r={self.rank}"] if self.rank else []
        words += [] if self.clip else ["not clipped"]
        words += ["updates in backward"] if self.early else []
        return ", ".join(words)


CASES = (
    Case(shape="A", host_mib=512, what="nothing"),
    Case(shape="A", host_mib=512, what="nothing", batch=4),
    Case(shape="B", host_mib=400, what="half of the states"),
    Case(shape="B", host_mib=400, what="half of the states", batch=4, clip=False),
    Case(shape="C", host_mib=470, what="states"),
    Case(shape="C", host_mib=540, what="states", accumulate=2, clip=False),
    Case(shape="C", host_mib=340, what="states, half of the gradients"),
    Case(shape="C", host_mib=400, what="states, half of the gradients", accumulate=2, batch=2),
    Case(shape="C", host_mib=220, what="states, gradients, half of the weights"),
    Case(shape="C", host_mib=220, what="states, gradients, half of the weights", batch=4),
    Case(shape="C", host_mib=220, what="states, most of the weights", clip=False, early=True),
    Case(shape="C", host_mib=140, what="half of the frozen weights", rank=8, batch=2),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case, predicted and measured: seconds and bytes per step."""

    case: Case
    measured: dict[str, float]
    predicted: dict[str, float]
    median_s: float
    """Of the steps; all other measured figures are of the shortest one."""
    binds: str
    plan: Sequence[str]
    """What it said of where things are."""
    machines: Sequence[Any]
    """As they were calibrated before and after."""

    @property
    def error(self) -> float:
        """Predicted / measured - 1."""
        return self.predicted["step_s"] / self.measured["step_s"] - 1


def shape(name: str) -> dict[str, Any]:
    """The config of a model."""
    layers, hidden = SHAPES[name]
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": round(2.6875 * hidden),
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
    }


def made_in(folder: Path, name: str) -> Path:
    """Where the checkpoint of a model lies."""
    return folder / f"train-predictions-{name}-v1"


def make(folder: Path, name: str) -> Path:
    """A checkpoint, made once."""
    path = made_in(folder, name)
    if not (path / "done").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**shape(name))).to(torch.bfloat16).save_pretrained(path)
        (path / "done").touch()
    return path


def measure_steps(model: Any, optimizer: Any, case: Case) -> dict[str, list[float]]:
    """Seconds and bytes of each step, and of its phases."""
    import torch

    found: dict[str, list[float]] = {}
    draw = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        passes = [torch.randint(0, VOCABULARY, (case.batch, LENGTH), generator=draw) for _ in range(case.accumulate)]
        io, start = moved(), time.perf_counter()
        forward = backward = 0.0
        for ids in passes:
            begun = time.perf_counter()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            half = time.perf_counter()
            (loss / case.accumulate).backward()
            forward += half - begun
            backward += time.perf_counter() - half
        begun = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        end = time.perf_counter()
        after = moved()
        values = {
            "step_s": end - start, "forward_s": forward, "backward_s": backward, "update_s": end - begun,
            "read_nbytes": float(after[0] - io[0]), "written_nbytes": float(after[1] - io[1]),
        }  # fmt: skip
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def worker(job: Job) -> dict[str, Any]:
    """Calibrate, run, calibrate."""
    import msgspec

    import penstock
    from penstock.caches import calibration_cache
    from penstock.devices import open_device
    from penstock.runtime.calibration.calibrate import calibrate

    def calibrated() -> Any:
        device = open_device("cpu")
        try:
            calibration = calibrate(device, [str(folder)], quick=True)
            calibration_cache().write(calibration, device)  # what prepare decides by is what the prediction knows
            return calibration.hardware
        finally:
            device.close()

    folder = Path(job["folder"])
    case = Case(**job["case"])
    path = make(folder, case.shape)
    choice = penstock.AdamW(lr=1e-5, max_grad_norm=1.0 if case.clip else None)
    lora: Any = None
    if case.rank:
        import peft

        lora = peft.LoraConfig(r=case.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    updates: Any = "backward" if case.early else "step"
    before = calibrated()
    with tempfile.TemporaryDirectory(dir=folder) as run:
        model, optimizer = penstock.prepare(
            str(path), optimizer=choice, disk=str(Path(run) / "run"), max_memory={"host": case.host_mib << 20},
            device="cpu", accumulate=case.accumulate, updates=updates, lora=lora, context=LENGTH, batch=case.batch,
        )  # fmt: skip
        steps = measure_steps(model, optimizer, case)
        plan = list(model.penstock.plan.notes)
        penstock.save(model, optimizer).wait()
        penstock.close(model)
    after = calibrated()
    best = min(range(SKIPPED, STEPS), key=steps["step_s"].__getitem__)
    return {
        "measured": {name: values[best] for name, values in steps.items()},
        "median_s": statistics.median(steps["step_s"][SKIPPED:]),
        "plan": plan,
        "machines": [msgspec.to_builtins(each) for each in (before, after)],
    }


def foreseen(case: Case, path: Path, machines: Sequence[Any]) -> dict[str, Any]:
    """What is predicted of a case: the mean of what it would be on machines as they were calibrated."""
    import msgspec

    import penstock
    from penstock.runtime.foresight import Foresight, Room
    from penstock.runtime.training.forecast import TrainingForesight
    from penstock.runtime.training.foreseen import Adapters, TrainingWork
    from penstock.scheduler.hardware import Hardware

    adapters = Adapters(rank=case.rank) if case.rank else None
    training = TrainingForesight(Foresight(str(path)), adapters=adapters)
    work = TrainingWork(
        choice=penstock.AdamW(max_grad_norm=1.0 if case.clip else None),
        batch=case.batch,
        context=LENGTH,
        accumulate=case.accumulate,
        updates="backward" if case.early else "step",
        adapters=adapters,
    )
    room = Room(host=case.host_mib << 20)
    found = [training.forecast(msgspec.convert(each, Hardware), work, room=room) for each in machines]
    steps = [each.prediction for each in found]
    return {
        "predicted": {
            **{name: statistics.mean(getattr(each, name) for each in steps) for name in PHASES[1:]},
            "step_s": statistics.mean(each.seconds for each in steps),
            "read_nbytes": steps[0].traffic.read,
            "written_nbytes": steps[0].traffic.written,
        },
        "binds": found[0].binds,
    }


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """The cases that were asked for."""
    runner = Runner("benchmarks.train_predictions", timeout_s=arguments.timeout)
    folder = arguments.dir or default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    first, _, last = arguments.only.partition(":")
    for case in CASES[int(first or 0) : int(last or len(CASES))]:
        found = runner.run({"case": asdict(case), "folder": str(folder.resolve())})
        row = Row(case=case, **found, **foreseen(case, made_in(folder, case.shape), found["machines"]))
        print(
            f"{case.name}: {row.predicted['step_s']:.3f} / {row.measured['step_s']:.3f} s, {row.error:+.0%}", flush=True
        )
        yield row


COLUMNS = (
    "model, what is not in memory, a step",
    "measured\ns/step",
    "forward",
    "backward",
    "step()",
    "predicted\ns/step",
    "forward",
    "backward",
    "step()",
    "error",
    "median/\nbest",
    "MB read\n/ predicted",
    "written\n/ predicted",
    "bound by",
)
PHASES = ("step_s", "forward_s", "backward_s", "update_s")


def shown(row: Row) -> list[str]:
    """A line of the table."""
    seconds = [f"{each[name]:.3f}" for each in (row.measured, row.predicted) for name in PHASES]
    nbytes = [
        f"{row.measured[name] / 1e6:.0f} / {row.predicted[name] / 1e6:.0f}"
        for name in ("read_nbytes", "written_nbytes")
    ]
    return [
        row.case.name,
        *seconds,
        f"{row.error:+.0%}",
        f"{row.median_s / row.measured['step_s']:.2f}",
        *nbytes,
        row.binds,
    ]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default=":", metavar="FIRST:LAST", help="these cases of the list, the last left out")
    parser.add_argument(
        "--report", nargs="+", type=Path, help="measure nothing: foresee what is in these --json files again"
    )


def reported(arguments: argparse.Namespace) -> Iterator[Row]:
    """What was measured before, foreseen now."""
    folder = arguments.dir or default_folder()
    for path in arguments.report:
        for each in json.loads(path.read_text())["measured"]:
            case = Case(**each.pop("case"))
            yield Row(case=case, **{**each, **foreseen(case, made_in(folder, case.shape), each["machines"])})


def main() -> None:
    """Command line."""
    arguments = arguments_of("train_predictions", __doc__, _options)
    rows = list(reported(arguments) if arguments.report else measure(arguments))
    errors = sorted(abs(row.error) for row in rows)
    figures = [
        Figure(name="median error", value=statistics.median(errors), goal=MEDIAN_GOAL),
        Figure(name="worst error", value=errors[-1], goal=WORST_GOAL),
    ]
    title = "steps, predicted and measured"
    finish(arguments, table(title, COLUMNS, [shown(row) for row in rows]), figures, [asdict(row) for row in rows])


if __name__ == "__main__":
    main_or_worker(main, worker)
