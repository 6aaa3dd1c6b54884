"""`penstock plan`: what a model will take, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..budget import parse_budget
from ..memory.errors import UsageError
from ..scheduler.planfile import write_plan
from ..scheduler.sizes import DEFAULT_CONTEXT, Training, Workload
from .options import MACHINE, Disk, Dtype, Json, MaxMemory, TrustRemoteCode
from .output import Output

_WORK = "The work"
_ANSWER = "What is told"
_TRAINING: tuple[Training, ...] = ("adamw", "lora")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Where:
    """The machine that is asked about."""

    hardware: str | None
    max_memory: str
    device: str
    disk: Path | None


def plan(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="CKPT", help="Folder with a config.json, or a Hub id. Weights are not needed."),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.", metavar="N", rich_help_panel=_WORK)] = 128,
    generate: Annotated[
        int, typer.Option(min=1, help="Tokens of an answer.", metavar="N", rich_help_panel=_WORK)
    ] = 128,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences at a time. Default: 1.", metavar="N", rich_help_panel=_WORK),
    ] = None,
    throughput: Annotated[
        bool, typer.Option("--throughput", help="Choose the batch that gives most tokens/s.", rich_help_panel=_WORK)
    ] = False,
    train: Annotated[
        str | None,
        typer.Option(
            help="With --sizes: adamw (all weights) or lora (adapters). Default: inference.", rich_help_panel=_WORK
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="With --sizes: tokens per sequence. Default: 512, or what the model has.",
            metavar="N",
            rich_help_panel=_WORK,
        ),
    ] = None,
    rank: Annotated[
        int, typer.Option(min=1, help="With --sizes: rank of the adapters.", metavar="N", rich_help_panel=_WORK)
    ] = 16,
    sizes: Annotated[
        bool,
        typer.Option(
            "--sizes",
            help="What weights, KV, activations, gradients and optimizer states take.",
            rich_help_panel=_ANSWER,
        ),
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            help="For example 5tok/s: which of the known machines reach it, the cheapest first.",
            rich_help_panel=_ANSWER,
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="For example host=16GiB:128GiB, device=8GiB:48GiB or batch=1:64.", rich_help_panel=_ANSWER),
    ] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw the sweep in an HTML file.", rich_help_panel=_ANSWER)] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Write the predicted run as a profile for `penstock prof`.", rich_help_panel=_ANSWER),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Write the plan as a file, for load(plan=…) and run --plan.", rich_help_panel=_ANSWER),
    ] = None,
    top: Annotated[
        int, typer.Option(min=1, help="With --sizes: show so many modules.", metavar="N", rich_help_panel=_ANSWER)
    ] = 8,
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Another machine: a known one, or a hardware file. Default: this one, as `penstock calibrate` found.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    system: Annotated[
        str, typer.Option(help="Another system's schedule: flexgen, zero-inference, …", rich_help_panel=MACHINE)
    ] = "penstock",
    model: Annotated[
        str | None, typer.Option(help="A config.json, in the place of CKPT.", rich_help_panel=_WORK)
    ] = None,
    workload: Annotated[
        Path | None,
        typer.Option(help="A workload file, in the place of the options above.", rich_help_panel=_WORK),
    ] = None,
    dtype: Dtype = "auto",
    max_memory: MaxMemory = "auto",
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:N. A device budget needs no GPU.", rich_help_panel=MACHINE)
    ] = "auto",
    disk: Disk = None,
    trust_remote_code: TrustRemoteCode = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    as_json: Json = False,
) -> int | None:
    """Tell what a model will take and how fast it will run, from its config alone and before anything is loaded.

    The model's own code runs on tensors without values; blocks are placed as a run would place them; and the run is
    simulated with the rates of this machine, or of another one. Exit code 3 means that it does not fit.

    Examples:

        penstock plan ./llama --hardware rtx4090-1ssd --prompt 512 --generate 64

        penstock plan ./llama --sweep host=16GiB:128GiB --chart sweep.html

        penstock plan ./llama --sizes --train adamw --batch 4 --context 2048
    """
    given = {
        "--sizes": sizes,
        "--target": target,
        "--sweep": sweep,
        "--hardware": hardware,
        "--max-memory": max_memory != "auto",
        "--device": device != "auto",
        "--disk": disk,
        "--save": save,
        "--profile": profile,
        "--workload": workload,
        "--throughput": throughput,
    }
    _refuse_together(
        {name for name, value in given.items() if value} | ({"--system"} if system != "penstock" else set())
    )
    if system != "penstock":
        from .plan_system import plan_system

        return plan_system(
            Output(), system, hardware=hardware, model=model or checkpoint, workload=workload, as_json=as_json
        )
    if (checkpoint is None) is (model is None):
        raise UsageError("give CKPT, a folder with a config.json or a Hub id; or a config.json by --model")
    source = checkpoint if checkpoint is not None else str(model)
    where = _Where(hardware=hardware, max_memory=max_memory, device=device, disk=disk)
    output = Output()
    if sizes:
        return _sizes(
            output,
            source,
            where,
            asked=_training(train, batch or 1, context, rank),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            top=top,
            as_json=as_json,
        )
    if train is not None or context is not None:
        raise UsageError("--train and --context belong to --sizes: add it")
    if chart is not None and sweep is None:
        raise UsageError("--chart draws a sweep: add for example --sweep host=16GiB:128GiB")
    if throughput and batch is not None:
        raise UsageError("--throughput chooses the batch: leave --batch out")
    with output.busy("building the model without its weights"):
        from .forecast import Forecaster, Work, parse_target, show, show_ranking, title_of, work_of
        from .forecast import rank as rank_machines
        from .machines import find_machine, known_machines
        from .sweep import parse_sweep, show_sweep
        from .sweep import sweep as run_sweep

        wanted = None if target is None else parse_target(target)
        asked_sweep = None if sweep is None else parse_sweep(sweep)
        budget = parse_budget(max_memory)
        machine = None if wanted is not None else find_machine(hardware, device=device, disk=disk, output=output)
        if workload is not None:
            work = work_of(workload)
        else:
            work = Work(prompt=prompt, generate=generate, batch=None if throughput else batch or 1)
        forecaster = Forecaster(source, work, dtype=dtype, trust_remote_code=trust_remote_code)
        if wanted is not None:
            ranking = rank_machines(forecaster, known_machines(), wanted)
        elif asked_sweep is not None:
            assert machine is not None
            points = run_sweep(forecaster, machine, budget, asked_sweep)
        else:
            assert machine is not None
            outlook = forecaster.outlook(machine, budget)
    if wanted is not None:
        return show_ranking(output, ranking, wanted, as_json=as_json)
    if asked_sweep is not None:
        assert machine is not None
        title = f"{source} on {machine.name}: {asked_sweep.name}"
        return show_sweep(output, asked_sweep, points, title=title, chart=chart, force=force, as_json=as_json)
    if save is not None:
        write_plan(save, outlook.forecast.plan, force=force)
    title = title_of(forecaster.foresight, outlook.forecast)
    show(output, outlook, title=title, as_json=as_json, profile=profile, force=force)
    return 0


_APART: tuple[tuple[str, str], ...] = (
    ("--system", "--sizes --target --sweep --max-memory --device --disk --save --profile --throughput"),
    ("--sizes", "--target --sweep --hardware --save --profile --workload --throughput"),
    ("--target", "--sweep --hardware --max-memory --device --disk --save --profile"),
    ("--sweep", "--save --profile"),
    ("--hardware", "--device --disk"),
    ("--workload", "--throughput"),
)
"""Options with which others have no meaning."""


def _refuse_together(given: set[str]) -> None:
    for option, others in _APART:
        clash = [other for other in others.split() if other in given]
        if option in given and clash:
            raise UsageError(f"{option} and {clash[0]} exclude each other: leave one of them out")


def _training(train: str | None, batch: int, context: int | None, rank: int) -> Workload:
    chosen = next((each for each in _TRAINING if each == train), None)
    if train is not None and chosen is None:
        raise UsageError(f"--train {train!r} is not a way to train: use {' or '.join(_TRAINING)}")
    return Workload(train=chosen, batch=batch, context=context or DEFAULT_CONTEXT, rank=rank)


def _sizes(
    output: Output,
    checkpoint: str,
    where: _Where,
    *,
    asked: Workload,
    dtype: str,
    trust_remote_code: bool,
    top: int,
    as_json: bool,
) -> int:
    budget = parse_budget(where.max_memory)
    with output.busy("building the model without its weights"):
        from .estimate import estimate, show  # torch and transformers take seconds

        found = estimate(
            checkpoint,
            workload=asked,
            dtype=dtype,
            budget=budget,
            device=where.device,
            disk=where.disk,
            trust_remote_code=trust_remote_code,
        )
    return show(output, found, top=top, as_json=as_json)
