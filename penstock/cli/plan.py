"""`penstock plan`: what a model will take, before anything is loaded."""

from __future__ import annotations

from ..budget import parse_budget
from . import plan_options as option
from .options import Disk, Dtype, Json, MaxMemory, TrustRemoteCode
from .output import Output
from .plan_request import SYSTEM, TOP, Answer, PlanRequest, RunOptions, TrainingOptions, Where


def plan(
    checkpoint: option.Checkpoint = None,
    prompt: option.Prompt = None,
    generate: option.Generate = None,
    batch: option.Batch = None,
    throughput: option.Throughput = False,
    routing: option.Routing = None,
    train: option.Train = None,
    context: option.Context = None,
    accumulate: option.Accumulate = None,
    clip: option.Clip = None,
    updates: option.Updates = None,
    recompute: option.Recompute = None,
    lora: option.Lora = None,
    rank: option.Rank = None,
    sizes: option.Sizes = False,
    target: option.Target = None,
    sweep: option.Sweep = None,
    chart: option.Chart = None,
    profile: option.Profile = None,
    save: option.Save = None,
    top: option.Top = None,
    hardware: option.Hardware = None,
    system: option.System = SYSTEM,
    model: option.Model = None,
    workload: option.Workload = None,
    dtype: Dtype = "auto",
    max_memory: MaxMemory = "auto",
    device: option.Device = "auto",
    disk: Disk = None,
    trust_remote_code: TrustRemoteCode = False,
    force: option.Force = False,
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
    run = RunOptions(
        prompt=prompt, generate=generate, batch=batch, throughput=throughput, workload=workload, routing=routing
    )
    training = TrainingOptions(
        train=train, context=context, rank=rank, accumulate=accumulate, clip=clip, updates=updates,
        recompute=recompute, lora=lora,
    )  # fmt: skip
    answer = Answer(
        sizes=sizes, target=target, sweep=sweep, chart=chart, profile=profile, save=save, top=top, force=force,
        as_json=as_json,
    )  # fmt: skip
    where = Where(hardware=hardware, max_memory=max_memory, device=device, disk=disk)
    request = PlanRequest(
        checkpoint=checkpoint, model=model, system=system, run=run, training=training, answer=answer, where=where,
        dtype=dtype, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return _carry_out(request, Output())


def _carry_out(request: PlanRequest, output: Output) -> int:
    """Choose who answers, and import that: torch and transformers take seconds."""
    if request.system != SYSTEM:
        from .plan_system import plan_system

        return plan_system(
            output, request.system, hardware=request.where.hardware, model=request.model or request.checkpoint,
            workload=request.run.workload, as_json=request.answer.as_json,
        )  # fmt: skip
    if request.answer.sizes:
        return _sizes(request, output)
    with output.busy("starting"):
        from .plan_run import plan_run
        from .plan_training import plan_training
    return (plan_run if request.training.train is None else plan_training)(request, output)


def _sizes(request: PlanRequest, output: Output) -> int:
    workload = request.training.sizes(request.run.batch or 1)
    with output.busy("building the model without its weights"):
        from .estimate import estimate, show

        found = estimate(
            request.source,
            workload=workload,
            dtype=request.dtype,
            budget=parse_budget(request.where.max_memory),
            device=request.where.device,
            disk=request.where.disk,
            trust_remote_code=request.trust_remote_code,
        )
    return show(output, found, top=request.answer.top or TOP, as_json=request.answer.as_json)
