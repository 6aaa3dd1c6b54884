"""`penstock plan --system`: what another system would take for a workload on a machine. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..hardware import load
from ..memory.errors import UsageError
from ..scheduler.hardware import Hardware
from ..scheduler.modelconfig import read_config
from ..scheduler.modelshape import ModelShape
from ..scheduler.systems import system
from ..scheduler.systems.prediction import Prediction
from ..scheduler.work import Work, read_work
from .output import Output


def plan_system(
    output: Output,
    name: str,
    *,
    hardware: str | None,
    model: str | None,
    workload: Path | None,
    as_json: bool,
) -> int:
    """Predict and print; 0.

    Raises:
        UsageError: an option is missing, or a file cannot be used.
        CheckpointError: the config cannot be used.
        DoesNotFitError: the model does not fit where the system puts it.
    """
    chosen = system(name)
    if hardware is None or model is None or workload is None:
        given = {"--hardware": hardware, "--model": model, "--workload": workload}
        missing = " and ".join(option for option, value in given.items() if value is None)
        raise UsageError(f"--system needs {missing}: a machine, a config.json and a workload file")
    machine, shape, work = load(hardware), read_config(model), read_work(workload)
    found = chosen.predict(machine, shape, work)
    if as_json:
        output.write_json(document(found, machine, shape))
    else:
        for line in lines(found, machine, shape, work):
            output.data.print(line, markup=False)
    return 0


def document(found: Prediction, machine: Hardware, model: ModelShape) -> dict[str, object]:
    """What --json prints: the prediction, with what it is of."""
    record: dict[str, object] = msgspec.to_builtins(found)
    seconds = {"s_per_step": record.pop("step_s"), "s_prefill": record.pop("prefill_s")}
    if found.kind != "finetune":
        seconds["s_per_token"] = seconds["s_per_step"]
    return {
        "system": record.pop("system"),
        "hardware": machine.name,
        "model": {"name": model.name, "parameters": model.parameters, "dtype": model.dtype},
        **seconds,
        **record,
    }


def lines(found: Prediction, machine: Hardware, model: ModelShape, work: Work) -> list[str]:
    """The prediction for people."""
    shown = [
        f"{found.system} on {machine.name}",
        f"{model.name or 'model'}, {model.parameters / 1e9:.3g} billion parameters in {model.dtype}",
        "",
    ]
    if work.kind == "finetune":
        shown.append(f"{found.step_s:.3g} s per step of {work.batch} × {work.context} tokens")
        shown.append(f"{found.tokens_per_s:.4g} tokens/s, {found.tflops or 0:.4g} TFLOPS per GPU")
    else:
        shown.append(f"{found.tokens_per_s:.4g} tokens/s, {work.batch} sequences of {work.prompt} + {work.generate}")
        shown.append(f"{found.prefill_s:.3g} s until the first token, {found.step_s:.3g} s for each that follows")
    shown += ["", "seconds of work by resource, of which the longest binds:"]
    ordered = sorted(found.busy.items(), key=lambda item: -item[1])
    shown += [f"  {name:12} {seconds:10.3g}" for name, seconds in ordered if seconds > 0]
    return [*shown, *(["", *found.notes] if found.notes else [])]
