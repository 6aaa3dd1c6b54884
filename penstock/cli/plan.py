"""`penstock plan`: what a model will take, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..budget import parse_budget
from ..memory.errors import UsageError
from ..scheduler.sizes import DEFAULT_CONTEXT, Training, Workload
from .options import MACHINE, Disk, Dtype, Json, MaxMemory, TrustRemoteCode
from .output import Output

_WORK = "The work"
_SIMULATION = "Other systems and machines"
_TRAINING: tuple[Training, ...] = ("adamw", "lora")


def plan(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="CKPT", help="Folder with a config.json, or a Hub id. Weights are not needed."),
    ] = None,
    sizes: Annotated[
        bool, typer.Option("--sizes", help="What weights, KV, activations, gradients and optimizer states will take.")
    ] = False,
    train: Annotated[
        str | None,
        typer.Option(help="adamw (all weights) or lora (adapters). Default: inference.", rich_help_panel=_WORK),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.", metavar="N", rich_help_panel=_WORK)] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens per sequence. Default: 512, or what the model has.", metavar="N", rich_help_panel=_WORK
        ),
    ] = None,
    rank: Annotated[
        int, typer.Option(min=1, help="Rank of the adapters of lora.", metavar="N", rich_help_panel=_WORK)
    ] = 16,
    dtype: Dtype = "auto",
    max_memory: MaxMemory = "auto",
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:N. A device budget needs no GPU.", rich_help_panel=MACHINE)
    ] = "auto",
    disk: Disk = None,
    top: Annotated[int, typer.Option(min=1, help="Show so many modules.", metavar="N")] = 8,
    trust_remote_code: TrustRemoteCode = False,
    system: Annotated[
        str | None,
        typer.Option(help="Simulate another system: flexgen, zero-inference, …", rich_help_panel=_SIMULATION),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="A machine: its file, or the name of a known one.", rich_help_panel=_SIMULATION)
    ] = None,
    model: Annotated[str | None, typer.Option(help="A config.json.", rich_help_panel=_SIMULATION)] = None,
    workload: Annotated[
        Path | None, typer.Option(help="A workload file (docs/planner.md).", rich_help_panel=_SIMULATION)
    ] = None,
    as_json: Json = False,
) -> int | None:
    """Tell what a model will take of each tier, from its config alone and in seconds.

    The model's own code runs on tensors without values, so that every architecture is measured as it is. Whether the
    result fits is said for --max-memory, or for what this machine has free; exit code 3 means that it does not, even
    streamed. Interpreter and libraries (some hundred MiB) come on top.

    Example: penstock plan ./llama --sizes --train adamw --batch 4 --context 2048
    """
    if system is not None:
        from .plan_system import plan_system

        return plan_system(
            Output(), system, hardware=hardware, model=model or checkpoint, workload=workload, as_json=as_json
        )
    if checkpoint is None:
        raise UsageError("CKPT is missing: give a folder with a config.json, or a Hub id")
    if not sizes:
        raise UsageError("there is nothing to show: add --sizes")
    chosen = next((each for each in _TRAINING if each == train), None)
    if train is not None and chosen is None:
        raise UsageError(f"--train {train!r} is not a way to train: use {' or '.join(_TRAINING)}")
    asked = Workload(train=chosen, batch=batch, context=context or DEFAULT_CONTEXT, rank=rank)
    budget = parse_budget(max_memory)
    output = Output()
    with output.busy("building the model without its weights"):
        from .estimate import estimate, show  # torch and transformers take seconds

        found = estimate(
            checkpoint,
            workload=asked,
            dtype=dtype,
            budget=budget,
            device=device,
            disk=disk,
            trust_remote_code=trust_remote_code,
        )
    return show(output, found, top=top, as_json=as_json)
