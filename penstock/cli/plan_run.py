"""Carries out `penstock plan` for a run: the forecast, a sweep, or a ranking of machines. Imported late."""

from __future__ import annotations

from ..budget import parse_budget
from ..scheduler.experts.tracefile import read_trace
from ..scheduler.planfile import write_plan
from .forecast import VIEW, AnswerWork, Forecaster, show, title_of, work_of
from .machines import find_machine, known_machines
from .output import Output
from .plan_request import GENERATE, PROMPT, PlanRequest, RunOptions
from .ranking import parse_target, rank, show_ranking
from .sweep import parse_sweep, show_sweep, sweep


def plan_run(request: PlanRequest, output: Output) -> int:
    """Foresee and print; the exit code.

    Raises:
        DoesNotFitError: it does not fit.
        UsageError: an option has no meaning, or a file cannot be used.
        TraceError: a trace cannot be read.
    """
    answer, where, source = request.answer, request.where, request.source
    target = None if answer.target is None else parse_target(answer.target)
    budget = parse_budget(where.max_memory)
    asked = None if answer.sweep is None else parse_sweep(answer.sweep)
    with output.busy("building the model without its weights"):
        work = _work(request.run)
        trace = None if request.run.routing is None else read_trace(request.run.routing)
        forecaster = Forecaster(
            source, work, dtype=request.dtype, trust_remote_code=request.trust_remote_code, trace=trace
        )
        if target is not None:
            ranking = rank(forecaster.on, known_machines(), target)
        else:
            machine = find_machine(where.hardware, device=where.device, disk=where.disk, output=output)
            if asked is not None:
                points = sweep(lambda on, room, size: forecaster.on(on, room, batch=size), machine, budget, asked)
            else:
                outlook = forecaster.outlook(machine, budget)
    if target is not None:
        return show_ranking(output, ranking, target, VIEW, as_json=answer.as_json)
    if asked is not None:
        title = f"{source} on {machine.name}: {asked.name}"
        return show_sweep(
            output, asked, points, VIEW, title=title, chart=answer.chart, force=answer.force, as_json=answer.as_json
        )
    if answer.save is not None:
        write_plan(answer.save, outlook.forecast.plan, force=answer.force)
    title = title_of(forecaster.foresight, outlook.forecast)
    show(output, outlook, title=title, as_json=answer.as_json, profile=answer.profile, force=answer.force)
    return 0


def _work(options: RunOptions) -> AnswerWork:
    if options.workload is not None:
        return work_of(options.workload)
    return AnswerWork(
        prompt=options.prompt or PROMPT,
        generate=options.generate or GENERATE,
        batch=None if options.throughput else options.batch or 1,
    )
