"""Fine-tuning on an emulated device: how much of a step the device waits, with states in host memory or partly on disk.

    python -m benchmarks.emulated_training                          # S, 4 x 256 tokens, both links 2 GiB/s
    python -m benchmarks.emulated_training --batch 1,4 --device-budget 96MiB --host-budget 1536MiB
    python -m benchmarks.emulated_training --dtype float32          # a CPU without bf16 instructions: four times faster

The model is that of `benchmarks.training` (S: 0.17 B parameters). Each thread computes on one core: the one that runs
forward and backward is the device, the one that updates is the CPU. So the device is at work while its thread takes
CPU time; the rest of the wall clock it waits: for weights, for gradients that leave, for an update, or for a core that
other threads have. The resident run is plain PyTorch on one thread, which makes its updates itself.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .contenders.training import LENGTH
from .inference import parse_nbytes
from .reference_checkpoint import default_folder
from .streams import GIB, Figure, Job, Runner, arguments_of, finish, main_or_worker, table
from .training import SIZES, make

IDLE_GOAL = 0.10
SKIPPED, LAST = 1, 1
"""Steps that do not count: in the first one orders are learned, and beside the last one nothing is updated after it."""


class _Phases:
    """Wall clock and CPU time of the calling thread, phase by phase."""

    def __init__(self) -> None:
        self.steps: list[dict[str, tuple[float, float]]] = []

    def step(self) -> None:
        """A step begins."""
        self.steps.append({})

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """One phase of it."""
        wall, own = time.perf_counter(), time.thread_time()
        found = work()
        self.steps[-1][name] = time.perf_counter() - wall, time.thread_time() - own
        return found

    def report(self) -> dict[str, Any]:
        """Means over the steps that count, in seconds."""
        counted = self.steps[SKIPPED:-LAST]
        found: dict[str, Any] = {}
        for name in counted[0]:
            found[f"{name}_s"] = statistics.mean(step[name][0] for step in counted)
            found[f"{name}_busy_s"] = statistics.mean(step[name][1] for step in counted)
        for part in ("s", "busy_s"):
            found[f"step_{part}"] = sum(found[f"{name}_{part}"] for name in counted[0])
        return found


def worker(job: Job) -> dict[str, Any]:
    """Run one contender. `job`: checkpoint, run, device (None: resident), budgets, batch, clip, steps, update_on."""
    import torch

    torch.set_num_threads(1)
    phases, losses = _Phases(), []
    model, update, after = (_resident if job["device"] is None else _penstock)(job)
    for step in range(job["steps"]):
        ids = torch.randint(0, 8192, (job["batch"], LENGTH), generator=torch.Generator().manual_seed(step))
        phases.step()
        loss = phases.run("forward", lambda ids=ids: model(input_ids=ids, labels=ids, use_cache=False).loss)
        losses.append(float(loss.detach()))
        phases.run("backward", loss.backward)
        phases.run("update", update)
    return {**phases.report(), **after(), "losses": losses}


def _penstock(job: Job) -> tuple[Any, Callable[[], None], Callable[[], dict[str, Any]]]:
    import penstock

    model, optimizer = penstock.prepare(
        job["checkpoint"],
        optimizer=penstock.AdamW(lr=1e-5, max_grad_norm=job["clip"]),
        disk=job["run"],
        max_memory={"device": job["device_nbytes"], "host": job["host_nbytes"]},
        device=job["device"],
        dtype=job["dtype"],
        activations="recompute",
        updates="backward" if job["clip"] is None else "step",
        update_on=job["update_on"],
    )
    plan = str(penstock.explain(model))

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def after() -> dict[str, Any]:
        found = model.penstock.statistics()
        penstock.close(model)
        waits = {"waited_for_blocks_s": found.waited_s / job["steps"], "fetched_on_demand": found.demand_fetches}
        return {"plan": plan, **waits}

    return model, update, after


def _resident(job: Job) -> tuple[Any, Callable[[], None], Callable[[], dict[str, Any]]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=getattr(torch, job["dtype"]))
    parameters = list(model.parameters())
    masters = [parameter.detach().float().requires_grad_() for parameter in parameters]
    optimizer = torch.optim.AdamW(masters, lr=1e-5)

    def update() -> None:
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        if job["clip"] is not None:
            torch.nn.utils.clip_grad_norm_(masters, job["clip"])
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)

    return model, update, dict


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=sorted(SIZES), default="S")
    parser.add_argument("--batch", default="4", help="comma-separated, of 256 tokens each (default: %(default)s)")
    parser.add_argument("--clip", default="none,1.0", help="comma-separated (default: %(default)s)")
    parser.add_argument("--device-budget", type=parse_nbytes, default=128 * 2**20, help="default: 128MiB")
    parser.add_argument("--host-budget", type=parse_nbytes, default=4 * GIB, help="default: 4GiB, which holds states")
    parser.add_argument("--link", type=parse_nbytes, default=2 * GIB, help="bytes per second each way (default: 2GiB)")
    parser.add_argument("--update-on", choices=("auto", "cpu", "device"), default="auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=4, help=f"more than {SKIPPED + LAST} (default: %(default)s)")
    parser.add_argument("--no-resident", action="store_true", help="leave the yardstick out")


COLUMNS = (
    "run", "s/step", "forward", "backward", "update", "device busy\ns/step", "device\nidle", "tokens/s",
    "losses\nequal",
)  # fmt: skip


def main() -> None:
    """Command line."""
    arguments = arguments_of("emulated_training", __doc__, _options)
    if arguments.steps <= SKIPPED + LAST:
        raise OSError(f"--steps must be more than {SKIPPED + LAST}: so many are not counted")
    folder = arguments.dir or default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    checkpoint = make(arguments.size, folder)
    runner = Runner("benchmarks.emulated_training", timeout_s=arguments.timeout)
    device = f"emulated:h2d={arguments.link}B/s,d2h={arguments.link}B/s"
    rows, figures, measured = [], [], []
    for batch in map(int, arguments.batch.split(",")):
        for text in arguments.clip.split(","):
            job = {
                "checkpoint": str(checkpoint),
                "device": None,
                "device_nbytes": arguments.device_budget,
                "host_nbytes": arguments.host_budget,
                "batch": batch,
                "clip": None if text == "none" else float(text),
                "steps": arguments.steps,
                "update_on": arguments.update_on,
                "dtype": arguments.dtype,
            }
            reports: dict[str, Any] = {} if arguments.no_resident else {"resident": runner.run(job)}
            with tempfile.TemporaryDirectory(dir=folder, prefix="training-") as run:
                reports["penstock"] = runner.run({**job, "device": device, "run": str(Path(run) / "run")})
            name = f"{arguments.size}, {batch} x {LENGTH}, clip {text}"
            losses = [report["losses"] for report in reports.values()]
            for way, report in reports.items():
                idle = 1 - report["step_busy_s"] / report["step_s"]
                phases = [
                    f"{report[f'{phase}_s']:.2f} ({report[f'{phase}_busy_s']:.2f})"
                    for phase in ("forward", "backward", "update")
                ]
                rows.append(
                    [
                        f"{name}: {way}",
                        f"{report['step_s']:.2f}",
                        *phases,
                        f"{report['step_busy_s']:.2f}",
                        f"{idle:.1%}",
                        f"{batch * LENGTH / report['step_s']:.0f}",
                        "yes" if all(each == losses[0] for each in losses) else "no",
                    ]
                )
                if way == "penstock":
                    figures.append(Figure(name=f"device idle, {name}", value=idle, goal=IDLE_GOAL))
            measured.append({"name": name, **reports})
    title = f"emulated device, {arguments.link / GIB:g} GiB/s each way: seconds per step (at work)"
    finish(arguments, table(title, COLUMNS, rows), figures, measured)


if __name__ == "__main__":
    main_or_worker(main, worker)
