"""What the profiler's hooks take of a step, measured in place: time inside each, with the caches that it finds there.

    python -m benchmarks.profiler_hooks
    python -m benchmarks.profiler_hooks --workloads training --levels light --steps 20

Pairs of steps with and without the profiler (`benchmarks.profiler_overhead`) see everything, and a percent of it drowns
in what a shared machine does between two steps. This sees hooks only: not the threads that sample and write, which take
the cores' time but not the step's unless all cores are busy. The first steps, in which models and tensors are new, are
left out.
"""

import argparse
import functools
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .profiler_overhead import resident, training
from .streams import Figure, Job, Runner, arguments_of, finish, main_or_worker, table

GOALS = {"light": 0.01, "full": 0.05}
WARM_UP, FIRST = 3, 4
STEPS = {"training": 12, "resident": 70}
HOOKS = {
    "calls.ModuleWatch": ("_before", "_after", "_look", "_parameter_came"),
    "steps.StepWatch": ("_before_optimizer", "_after_optimizer"),
    "backward.BackwardWatch": ("_begin", "_input_reached", "_pass_done", "module_returned"),
    "activations.ActivationWatch": ("_pack",),
}


@dataclass(kw_only=True)
class Spent:
    """Nanoseconds inside hooks, by name; what a hook calls of another one counts once."""

    by_name: Counter[str]
    inside: bool = False

    def wrap(self, owner: type, name: str) -> None:
        """Time a method from now on."""
        hook: Callable[..., Any] = owner.__dict__[name]

        @functools.wraps(hook)
        def timed(*arguments: Any, **named: Any) -> Any:
            if self.inside:
                return hook(*arguments, **named)
            self.inside, start = True, time.perf_counter_ns()
            try:
                return hook(*arguments, **named)
            finally:
                self.by_name[f"{owner.__name__}.{name}"] += time.perf_counter_ns() - start
                self.inside = False

        setattr(owner, name, timed)


def worker(job: Job) -> dict[str, Any]:
    """Run one workload recorded, with every hook timed."""
    from importlib import import_module

    import penstock

    spent = Spent(by_name=Counter())
    for place, names in HOOKS.items():
        module, _, kind = place.partition(".")
        owner = getattr(import_module(f"penstock.runtime.profiler.{module}"), kind)
        for name in names:
            spent.wrap(owner, name)
    step = {"training": training, "resident": resident}[job["workload"]](job)
    for _ in range(WARM_UP):
        step()
    with tempfile.TemporaryDirectory() as folder, penstock.Profiler(Path(folder) / "run.prof", level=job["level"]):
        for _ in range(FIRST):
            step()
        spent.by_name.clear()
        start = time.perf_counter_ns()
        for _ in range(job["steps"]):
            step()
        total = time.perf_counter_ns() - start
    return {"total_ns": total, "by_name": dict(spent.by_name)}


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workloads", default=",".join(STEPS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--levels", default="light,full", help="comma-separated (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="to measure, in place of a few seconds' worth")


def main() -> None:
    """Command line."""
    arguments = arguments_of("profiler_hooks", __doc__, _options)
    runner = Runner("benchmarks.profiler_hooks", timeout_s=arguments.timeout)
    rows, figures, found = [], [], []
    for workload in arguments.workloads.split(","):
        for level in arguments.levels.split(","):
            steps = arguments.steps or STEPS[workload]
            result = runner.run({"workload": workload, "level": level, "steps": steps})
            total, by_name = result["total_ns"], Counter(result["by_name"])
            most = ", ".join(f"{name} {ns / steps / 1e3:.0f} µs" for name, ns in by_name.most_common(3))
            share = by_name.total() / total
            rows.append([f"{workload}, {level}", f"{total / steps / 1e6:.1f}", f"{share:.2%}", most])
            figures.append(Figure(name=f"{workload}, {level}: share of a step", value=share, goal=GOALS[level]))
            found.append({"workload": workload, "level": level, "steps": steps, **result})
    columns = ("workload, level", "ms/step", "in hooks", "most of it, per step")
    finish(arguments, table("time inside the profiler's hooks", columns, rows), figures, found)


if __name__ == "__main__":
    main_or_worker(main, worker)
