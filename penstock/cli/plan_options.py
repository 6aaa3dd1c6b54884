"""Options of `penstock plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import MACHINE

_WORK = "The work"
_TRAINING = "Training"
_ANSWER = "What is told"

Checkpoint = Annotated[
    str | None,
    typer.Argument(metavar="CKPT", help="Folder with a config.json, or a Hub id. Weights are not needed."),
]
Prompt = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of a prompt. Default: 128.", metavar="N", rich_help_panel=_WORK),
]
Generate = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of an answer. Default: 128.", metavar="N", rich_help_panel=_WORK),
]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Sequences at a time. Default: 1.", metavar="N", rich_help_panel=_WORK)
]
Throughput = Annotated[
    bool, typer.Option("--throughput", help="Choose the batch that gives most tokens/s.", rich_help_panel=_WORK)
]
Routing = Annotated[
    Path | None,
    typer.Option(
        help="A trace of the model's routing (penstock moe record), to foresee experts by. Default: made-up routing.",
        metavar="TRACE",
        rich_help_panel=_WORK,
    ),
]
Model = Annotated[str | None, typer.Option(help="A config.json, in the place of CKPT.", rich_help_panel=_WORK)]
Workload = Annotated[
    Path | None, typer.Option(help="A workload file, in the place of the options above.", rich_help_panel=_WORK)
]
Train = Annotated[
    str | None,
    typer.Option(
        metavar="OPTIMIZER",
        help="Foresee a step of training: adamw, sgd (with momentum), lion; lora is adamw on adapters. With --sizes: "
        "adamw or lora.",
        rich_help_panel=_TRAINING,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context", "--seq", min=2, metavar="N", help="Tokens per sequence. Default: 512, or what the model has.",
        rich_help_panel=_TRAINING,
    ),
]  # fmt: skip
Accumulate = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Backward passes of a step. Default: 1.", rich_help_panel=_TRAINING),
]
Clip = Annotated[
    bool | None,
    typer.Option("--clip/--no-clip", help="Clip the norm of all gradients. Default: yes.", rich_help_panel=_TRAINING),
]
Updates = Annotated[
    str | None,
    typer.Option(
        metavar="WHEN",
        help="step: when all gradients are there. backward: as they come, without clipping. Default: step.",
        rich_help_panel=_TRAINING,
    ),
]
Recompute = Annotated[
    bool | None,
    typer.Option(
        "--recompute/--no-recompute",
        help="Make activations of layers again in backward. Default: where weights are streamed.",
        rich_help_panel=_TRAINING,
    ),
]
Lora = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Train adapters, not the weights; as for `penstock finetune`: r=16, or r=16,targets=q_proj+v_proj.",
        rich_help_panel=_TRAINING,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        min=1, help="With --sizes: rank of the adapters. Default: 16.", metavar="N", rich_help_panel=_TRAINING
    ),
]
Sizes = Annotated[
    bool,
    typer.Option(
        "--sizes", help="What weights, KV, activations, gradients and optimizer states take.", rich_help_panel=_ANSWER
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        help="For example 5tok/s, or 20s/step with --train: which of the known machines reach it, the cheapest first.",
        rich_help_panel=_ANSWER,
    ),
]
Sweep = Annotated[
    str | None,
    typer.Option(help="For example host=16GiB:128GiB, device=8GiB:48GiB or batch=1:64.", rich_help_panel=_ANSWER),
]
Chart = Annotated[Path | None, typer.Option(help="Draw the sweep in an HTML file.", rich_help_panel=_ANSWER)]
Profile = Annotated[
    Path | None, typer.Option(help="Write the predicted run as a profile for `penstock prof`.", rich_help_panel=_ANSWER)
]
Save = Annotated[
    Path | None,
    typer.Option(help="Write the plan as a file, for load(plan=…) and run --plan.", rich_help_panel=_ANSWER),
]
Top = Annotated[
    int | None,
    typer.Option(min=1, help="With --sizes: show so many modules. Default: 8.", metavar="N", rich_help_panel=_ANSWER),
]
Hardware = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Another machine: a known one, or a hardware file. Default: this one, as `penstock calibrate` found.",
        rich_help_panel=MACHINE,
    ),
]
System = Annotated[
    str, typer.Option(help="Another system's schedule: flexgen, zero-inference, …", rich_help_panel=MACHINE)
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:N. A device budget needs no GPU.", rich_help_panel=MACHINE)
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
