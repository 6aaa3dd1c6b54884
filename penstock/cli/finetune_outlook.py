"""What steps of `penstock finetune` are foreseen to take: told before they begin, or by --dry-run instead of them.

The same code as that of `penstock plan --train`, asked about the run's own options and budgets. Imported late.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
from rich.text import Text

from ..budget import MemoryBudget, parse_budget
from ..devices import open_device
from ..memory.capacity import disk_capacity, host_capacity
from ..memory.errors import DoesNotFitError
from ..memory.ledger import process_ledger
from ..runtime.explain import Explanation
from ..runtime.foresight import SYSTEM_NBYTES, Foresight, Room
from ..runtime.tiers import Wanted, resolve_budgets
from ..runtime.training.forecast import TrainingForesight
from ..runtime.training.foreseen import TrainingForecast, TrainingWork
from ..scheduler.hardware import Hardware
from ..scheduler.plan import Plan
from .finetune_job import Job, make_ready
from .finetune_plan import FinetunePlan, foreseen_plan, plan_lines
from .finetune_progress import duration
from .finetune_request import FinetuneRequest
from .forecast import seconds_text
from .generation import plan_summary
from .machines import find_machine, kept_machine
from .output import Output
from .plan_training import adapters_of
from .training_view import document, wear_text

OK = 0


def dry_run(request: FinetuneRequest, output: Output) -> int:
    """Look at checkpoint and data, tell what a run would take, and leave nothing behind. The exit code.

    Raises:
        DoesNotFitError: memory or a drive is too small.
        UsageError: checkpoint, data and options do not go together.
    """
    with tempfile.TemporaryDirectory(prefix="penstock-dry-run-") as folder:
        job = make_ready(request, Path(folder), None, output)
        hardware = kept_machine(request.device, disk=request.out) or find_machine(
            None, device=request.device, disk=request.out, output=output
        )
        budget = parse_budget(request.max_memory)
        with output.busy("foreseeing a step"):
            now = free_now(hardware, budget, device=request.device)
            found = foresee(request, job, now, room=Room(host=budget.host, device=budget.device))
        _check_space(request.out, found)
        plan = foreseen_plan(request, job, found)
        output.notes.print(Explanation(found.plan))
        aside = 0 if job.data.evaluation is None else job.data.evaluation.statistics.documents
        lines = [*plan_lines(plan, request, job.data.training.statistics, aside), *outlook_lines(found, plan)]
    for line in lines:
        output.notes.print(Text(line))
    if request.as_json:
        output.write_json({
            "run": os.fspath(request.out), "steps": plan.steps, "training": plan, "forecast": document(found),
            "plan": plan_summary(found.plan),
        })  # fmt: skip
    return OK


def _check_space(out: Path, found: TrainingForecast) -> None:
    needed, there = found.disk_nbytes + found.scratch_nbytes, disk_capacity(out)
    taken = sum(path.lstat().st_blocks * 512 for path in out.rglob("*"))  # by a run that is to go on
    room = there.free_nbytes + taken
    if needed > room:
        raise DoesNotFitError(
            f"the run needs {needed / 2**30:.2f} GiB of disk, and {there.folder} has room for {room / 2**30:.2f} GiB: "
            "free space there, or name another folder with --out",
            tier="disk",
            needed_nbytes=needed,
            available_nbytes=room,
        )


def foresee(request: FinetuneRequest, job: Job, hardware: Hardware, *, room: Room) -> TrainingForecast:
    """A step on a machine.

    Args:
        request: What was asked.
        job: The run.
        hardware: The machine.
        room: Budgets of it.

    Raises:
        DoesNotFitError: it does not fit.
        UsageError: the model's step cannot be foreseen.
    """
    recipe = request.recipe
    adapters = None if recipe.lora is None else adapters_of(recipe.lora)
    work = TrainingWork(
        choice=job.choice,
        batch=recipe.batch,
        context=job.data.training.seq,
        packed=True,
        accumulate=recipe.accumulate,
        activations=request.activations,  # type: ignore[arg-type]
        adapters=adapters,
    )
    common = {"dtype": recipe.dtype, "trust_remote_code": request.trust_remote_code}
    training = TrainingForesight(Foresight(job.folder, **common), adapters=adapters, **common)  # type: ignore[arg-type]
    try:
        return training.forecast(hardware, work, room=room)
    except DoesNotFitError as error:
        smaller = " A smaller --batch or --seq takes less of it" if recipe.batch > 1 or work.context > 2 else ""
        raise DoesNotFitError(
            f"{error}.{smaller}; --lora r=16 trains adapters instead" if adapters is None else f"{error}.{smaller}",
            tier=error.tier,
            needed_nbytes=error.needed_nbytes,
            available_nbytes=error.available_nbytes,
        ) from None


def free_now(hardware: Hardware, budget: MemoryBudget, *, device: str) -> Hardware:
    """A machine with the memory that a run begun now could have: what automatic budgets are worked out from, and what
    named ones are held against.

    Args:
        hardware: As it was calibrated.
        budget: What was asked for.
        device: That computes.

    Raises:
        UsageError: this machine has no such device.
    """
    opened = open_device(device)
    try:
        if budget.host is not None:  # as when it is booked: pages that the system would give back are there
            host = max(0, host_capacity().obtainable_nbytes - process_ledger().untouched("host"))
        else:
            wanted = Wanted(host=None, device=0 if budget.device is None else budget.device)
            host = resolve_budgets(wanted, opened, headroom_nbytes=0, disk_rate=None, link_rate=None).host
        there = opened.available_nbytes() if opened.separate else None
    finally:
        opened.close()
    gpu = hardware.gpu
    if gpu is not None and there is not None and budget.device is None:
        gpu = msgspec.structs.replace(gpu, memory_nbytes=there)
    return msgspec.structs.replace(hardware, host_nbytes=host + SYSTEM_NBYTES, gpu=gpu)


def room_of(plan: Plan) -> Room:
    """The budgets that a run has."""
    return Room(host=plan.host_budget_nbytes, device=plan.device_budget_nbytes)


def outlook_lines(found: TrainingForecast, plan: FinetunePlan) -> Iterator[str]:
    """A forecast for people, in two lines: time, and wear."""
    step, left = found.prediction, plan.steps - plan.done
    label = "emulated: " if found.hardware.emulated else ""
    busy: Mapping[str, float] = dict(sorted(step.busy_s.items(), key=lambda item: -item[1]))
    yield (
        f"{label}foreseen: {seconds_text(step.seconds)} per step (forward {seconds_text(step.forward_s)}, backward "
        f"{seconds_text(step.backward_s)}, step() {seconds_text(step.update_s)}), {found.tokens_per_s:,.3g} tokens/s, "
        f"{duration(left * step.seconds)} for {left} steps; bound by the {found.binds}: per step "
        + ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in busy.items())
    )
    yield wear_text(found, plan.written_nbytes / max(left, 1))
