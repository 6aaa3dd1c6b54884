"""`penstock finetune`: train a checkpoint that may be larger than memory, or adapters on it, on a file of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .finetune_request import FinetuneRequest, Recipe
from .lora_option import parse_lora
from .options import Checkpoint, Device, Dtype, MaxMemory, TrustRemoteCode
from .output import Output

_LENGTH = "How long"
_SIZE = "A step"
_RATE = "Optimizer"
_EVALUATION = "Evaluation"
_RUN = "The run's folder"

_Data = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help='.jsonl or .parquet, whose rows hold "text", "prompt" and "response", or "messages"; a .txt is one text.',
    ),
]
_Out = Annotated[
    Path,
    typer.Option(
        metavar="RUN", help="Folder of the run: states, commits, metrics. On a fast drive with room for them."
    ),
]
_Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps.", rich_help_panel=_LENGTH)]
_Epochs = Annotated[
    float | None, typer.Option(help="Times to see all data. Default: 1, unless --steps.", rich_help_panel=_LENGTH)
]
_Batch = Annotated[int, typer.Option(min=1, help="Sequences of a backward pass.", rich_help_panel=_SIZE)]
_Accumulate = Annotated[int, typer.Option(min=1, help="Backward passes of a step.", rich_help_panel=_SIZE)]
_Seq = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens of a sequence. Default: 1024, or what the model has.", rich_help_panel=_SIZE),
]
_TooLong = Annotated[
    str,
    typer.Option(
        metavar="WHAT",
        help="truncate, leave-out or refuse what is longer than a sequence; texts are cut and go on in the next.",
        rich_help_panel=_SIZE,
    ),
]
_Activations = Annotated[
    str,
    typer.Option(
        metavar="WHAT",
        help="auto, keep, recompute, or offload: to host memory beside a GPU, and to disk. Results are the same.",
        rich_help_panel=_SIZE,
    ),
]
_Optimizer = Annotated[str, typer.Option(help="adamw, sgd or lion.", rich_help_panel=_RATE)]
_Lr = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Learning rate. Default: adamw 1e-5, lion 1e-6, sgd 1e-3; ten times that with --lora.",
        rich_help_panel=_RATE,
    ),
]
_Schedule = Annotated[
    str, typer.Option(help="constant, linear or cosine: how the rate falls, to 0.", rich_help_panel=_RATE)
]
_Warmup = Annotated[
    float,
    typer.Option(min=0, help="Steps in which the rate rises, or their share: 100, 0.03.", rich_help_panel=_RATE),
]
_WeightDecay = Annotated[
    float | None, typer.Option(min=0, help="Default: adamw and lion 0.01, sgd 0.", rich_help_panel=_RATE)
]
_NoDecay = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERNS",
        help="Parameters without weight decay: `*bias,*norm*`; none decays all. Default: norms and biases.",
        rich_help_panel=_RATE,
    ),
]
_Betas = Annotated[str | None, typer.Option(metavar="B1,B2", help="Of adamw and lion.", rich_help_panel=_RATE)]
_Momentum = Annotated[float | None, typer.Option(min=0, help="Of sgd. Default: 0.9.", rich_help_panel=_RATE)]
_Clip = Annotated[
    float, typer.Option(min=0, help="Clip the norm of all gradients to this; 0 does not.", rich_help_panel=_RATE)
]
_Nonfinite = Annotated[
    str, typer.Option(help="raise or skip: a step whose gradient is not finite.", rich_help_panel=_RATE)
]
_Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="Of the order of the data, and of dropout.", rich_help_panel=_SIZE)
]
_EvalFraction = Annotated[
    float, typer.Option(min=0, help="Share of the rows to set aside for evaluation.", rich_help_panel=_EVALUATION)
]
_EvalEvery = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Evaluate every N steps, not at the end only.", rich_help_panel=_EVALUATION),
]
_CommitEvery = Annotated[
    int, typer.Option(min=1, metavar="N", help="Make the run durable every N steps.", rich_help_panel=_RUN)
]
_CommitMinutes = Annotated[
    float | None,
    typer.Option(metavar="M", help="And after a step when the last time is M minutes ago.", rich_help_panel=_RUN),
]
_Lora = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Train adapters, not the weights: r=16, or r=16,alpha=32,dropout=0.05,targets=q_proj+v_proj,rslora=true. "
        "Default: alpha twice r, no dropout, targets all-linear (all linear layers but the output layer).",
    ),
]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last commit, if any.", rich_help_panel=_RUN)]
_Force = Annotated[
    bool, typer.Option("--force", help="Take away the run that is there, and begin anew.", rich_help_panel=_RUN)
]
_DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Tell what a step would take, what binds, and what is written; then end."),
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print a summary as one JSON document.")]


def finetune(
    checkpoint: Checkpoint,
    data: _Data,
    out: _Out,
    lora: _Lora = None,
    steps: _Steps = None,
    epochs: _Epochs = None,
    batch: _Batch = 1,
    accumulate: _Accumulate = 1,
    seq: _Seq = None,
    too_long: _TooLong = "truncate",
    activations: _Activations = "auto",
    seed: _Seed = 0,
    optimizer: _Optimizer = "adamw",
    lr: _Lr = None,
    schedule: _Schedule = "linear",
    warmup: _Warmup = 0.0,
    weight_decay: _WeightDecay = None,
    no_decay: _NoDecay = None,
    betas: _Betas = None,
    momentum: _Momentum = None,
    clip: _Clip = 1.0,
    nonfinite: _Nonfinite = "raise",
    eval_fraction: _EvalFraction = 0.0,
    eval_every: _EvalEvery = None,
    commit_every: _CommitEvery = 20,
    commit_minutes: _CommitMinutes = None,
    resume: _Resume = False,
    force: _Force = False,
    dry_run: _DryRun = False,
    max_memory: MaxMemory = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: _AsJson = False,
) -> int:
    """Train all weights of a checkpoint that may be larger than memory, or adapters beside them (--lora).

    Masters in fp32 and the optimizer's states lie in RUN; updates have the bits of a run in memory. A run that was
    killed goes on from its last commit with --resume and the same options, and has the losses of one that was not.
    SIGTERM and Ctrl-C commit before they end it. RUN/metrics.jsonl has a line per step, RUN/loss.svg the curve.

    Example: penstock finetune ./llama --data notes.jsonl --out ./run --epochs 2 --lr 2e-5 --max-memory host=8GiB
    """
    recipe = Recipe(
        steps=steps, epochs=epochs, batch=batch, accumulate=accumulate, seq=seq, too_long=too_long, seed=seed,
        optimizer=optimizer, lr=lr, schedule=schedule, warmup=warmup, weight_decay=weight_decay, no_decay=no_decay,
        betas=betas, momentum=momentum, clip=clip, nonfinite=nonfinite, eval_fraction=eval_fraction, dtype=dtype,
        lora=None if lora is None else parse_lora(lora),
    )  # fmt: skip
    request = FinetuneRequest(
        checkpoint=checkpoint, data=data, out=out, recipe=recipe, eval_every=eval_every, commit_every=commit_every,
        commit_minutes=commit_minutes, activations=activations, resume=resume, force=force, dry_run=dry_run,
        max_memory=max_memory, device=device, trust_remote_code=trust_remote_code, as_json=as_json,
    )  # fmt: skip
    output = Output()
    with output.busy("starting"):
        from .finetuning import carry_out  # torch and transformers take seconds
    return carry_out(request, output)
