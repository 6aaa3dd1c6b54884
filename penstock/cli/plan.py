"""`penstock plan`: what a model will take, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..budget import parse_budget
from ..memory.errors import UsageError
from .options import MACHINE, Disk, Dtype, Json, MaxMemory, TrustRemoteCode
from .output import Output
from .plan_request import Answer, TrainingOptions, Where, refuse_together

_WORK = "The work"
_TRAINING = "Training"
_ANSWER = "What is told"

_Checkpoint = Annotated[
    str | None,
    typer.Argument(metavar="CKPT", help="Folder with a config.json, or a Hub id. Weights are not needed."),
]
_Prompt = Annotated[int, typer.Option(min=1, help="Tokens of a prompt.", metavar="N", rich_help_panel=_WORK)]
_Generate = Annotated[int, typer.Option(min=1, help="Tokens of an answer.", metavar="N", rich_help_panel=_WORK)]
_Batch = Annotated[
    int | None, typer.Option(min=1, help="Sequences at a time. Default: 1.", metavar="N", rich_help_panel=_WORK)
]
_Throughput = Annotated[
    bool, typer.Option("--throughput", help="Choose the batch that gives most tokens/s.", rich_help_panel=_WORK)
]
_Model = Annotated[str | None, typer.Option(help="A config.json, in the place of CKPT.", rich_help_panel=_WORK)]
_Workload = Annotated[
    Path | None, typer.Option(help="A workload file, in the place of the options above.", rich_help_panel=_WORK)
]
_Train = Annotated[
    str | None,
    typer.Option(
        metavar="OPTIMIZER",
        help="Foresee a step of training: adamw, sgd (with momentum) or lion. With --sizes: adamw or lora.",
        rich_help_panel=_TRAINING,
    ),
]
_Context = Annotated[
    int | None,
    typer.Option(
        "--context", "--seq", min=2, metavar="N", help="Tokens per sequence. Default: 512, or what the model has.",
        rich_help_panel=_TRAINING,
    ),
]  # fmt: skip
_Accumulate = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Backward passes of a step. Default: 1.", rich_help_panel=_TRAINING),
]
_Clip = Annotated[
    bool | None,
    typer.Option("--clip/--no-clip", help="Clip the norm of all gradients. Default: yes.", rich_help_panel=_TRAINING),
]
_Updates = Annotated[
    str | None,
    typer.Option(
        metavar="WHEN",
        help="step: when all gradients are there. backward: as they come, without clipping. Default: step.",
        rich_help_panel=_TRAINING,
    ),
]
_Recompute = Annotated[
    bool | None,
    typer.Option(
        "--recompute/--no-recompute",
        help="Make activations of layers again in backward. Default: where weights are streamed.",
        rich_help_panel=_TRAINING,
    ),
]
_Lora = Annotated[
    str | None,
    typer.Option(
        metavar="r=N", help="Train adapters of this rank: r=16, or r=16,targets=q_proj+v_proj.",
        rich_help_panel=_TRAINING,
    ),
]  # fmt: skip
_Rank = Annotated[
    int | None,
    typer.Option(
        min=1, help="With --sizes: rank of the adapters. Default: 16.", metavar="N", rich_help_panel=_TRAINING
    ),
]
_Sizes = Annotated[
    bool,
    typer.Option(
        "--sizes", help="What weights, KV, activations, gradients and optimizer states take.", rich_help_panel=_ANSWER
    ),
]
_Target = Annotated[
    str | None,
    typer.Option(
        help="For example 5tok/s, or 20s/step with --train: which of the known machines reach it, the cheapest first.",
        rich_help_panel=_ANSWER,
    ),
]
_Sweep = Annotated[
    str | None,
    typer.Option(help="For example host=16GiB:128GiB, device=8GiB:48GiB or batch=1:64.", rich_help_panel=_ANSWER),
]
_Chart = Annotated[Path | None, typer.Option(help="Draw the sweep in an HTML file.", rich_help_panel=_ANSWER)]
_Profile = Annotated[
    Path | None, typer.Option(help="Write the predicted run as a profile for `penstock prof`.", rich_help_panel=_ANSWER)
]
_Save = Annotated[
    Path | None,
    typer.Option(help="Write the plan as a file, for load(plan=…) and run --plan.", rich_help_panel=_ANSWER),
]
_Top = Annotated[
    int, typer.Option(min=1, help="With --sizes: show so many modules.", metavar="N", rich_help_panel=_ANSWER)
]
_Hardware = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Another machine: a known one, or a hardware file. Default: this one, as `penstock calibrate` found.",
        rich_help_panel=MACHINE,
    ),
]
_System = Annotated[
    str, typer.Option(help="Another system's schedule: flexgen, zero-inference, …", rich_help_panel=MACHINE)
]
_Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:N. A device budget needs no GPU.", rich_help_panel=MACHINE)
]
_Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]


def plan(
    checkpoint: _Checkpoint = None,
    prompt: _Prompt = 128,
    generate: _Generate = 128,
    batch: _Batch = None,
    throughput: _Throughput = False,
    train: _Train = None,
    context: _Context = None,
    accumulate: _Accumulate = None,
    clip: _Clip = None,
    updates: _Updates = None,
    recompute: _Recompute = None,
    lora: _Lora = None,
    rank: _Rank = None,
    sizes: _Sizes = False,
    target: _Target = None,
    sweep: _Sweep = None,
    chart: _Chart = None,
    profile: _Profile = None,
    save: _Save = None,
    top: _Top = 8,
    hardware: _Hardware = None,
    system: _System = "penstock",
    model: _Model = None,
    workload: _Workload = None,
    dtype: Dtype = "auto",
    max_memory: MaxMemory = "auto",
    device: _Device = "auto",
    disk: Disk = None,
    trust_remote_code: TrustRemoteCode = False,
    force: _Force = False,
    as_json: Json = False,
) -> int | None:
    """Tell what a model will take and how fast it will run, from its config alone and before anything is loaded.

    The model's own code runs on tensors without values; blocks are placed as a run would place them; and the run, or a
    step of training, is simulated with the rates of this machine, or of another one. Exit code 3 means that it does not
    fit.

    Examples:

        penstock plan ./llama --hardware rtx4090-1ssd --prompt 512 --generate 64

        penstock plan ./llama --train adamw --batch 4 --seq 1024 --accumulate 8

        penstock plan ./llama --sweep host=16GiB:128GiB --chart sweep.html

        penstock plan ./llama --sizes --train adamw --batch 4 --context 2048
    """
    refuse_together(
        {
            "--sizes": sizes, "--target": target, "--sweep": sweep, "--hardware": hardware,
            "--device": device != "auto",
            "--max-memory": max_memory != "auto", "--disk": disk, "--save": save, "--profile": profile,
            "--workload": workload, "--throughput": throughput, "--system": system != "penstock",
            "--train": train is not None and not sizes,
        }
    )  # fmt: skip
    output = Output()
    if system != "penstock":
        from .plan_system import plan_system

        return plan_system(
            output, system, hardware=hardware, model=model or checkpoint, workload=workload, as_json=as_json
        )
    if (checkpoint is None) is (model is None):
        raise UsageError("give CKPT, a folder with a config.json or a Hub id; or a config.json by --model")
    training = TrainingOptions(
        train=train, context=context, rank=rank, accumulate=accumulate, clip=clip, updates=updates, recompute=recompute,
        lora=lora,
    )  # fmt: skip
    training.check(sizes=sizes)
    if chart is not None and sweep is None:
        raise UsageError("--chart draws a sweep: add for example --sweep host=16GiB:128GiB")
    if throughput and batch is not None:
        raise UsageError("--throughput chooses the batch: leave --batch out")
    source = checkpoint if checkpoint is not None else str(model)
    where = Where(hardware=hardware, max_memory=max_memory, device=device, disk=disk)
    answer = Answer(
        target=target, sweep=sweep, chart=chart, profile=profile, save=save, force=force, as_json=as_json
    )  # fmt: skip
    if sizes:
        return _sizes(output, source, where, training, batch or 1, dtype, trust_remote_code, top, as_json)
    parse_budget(max_memory)  # raises before the slow imports rather than after
    with output.busy("starting"):
        from .plan_run import plan_run
        from .plan_training import plan_training
    if train is not None:
        return plan_training(
            output, source, where, answer, training, batch=batch or 1, dtype=dtype, trust_remote_code=trust_remote_code
        )
    return plan_run(
        output, source, where, answer, prompt=prompt, generate=generate, batch=None if throughput else batch or 1,
        workload=workload, dtype=dtype, trust_remote_code=trust_remote_code,
    )  # fmt: skip


def _sizes(
    output: Output,
    checkpoint: str,
    where: Where,
    training: TrainingOptions,
    batch: int,
    dtype: str,
    trust_remote_code: bool,
    top: int,
    as_json: bool,
) -> int:
    asked, budget = training.sizes(batch), parse_budget(where.max_memory)
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
