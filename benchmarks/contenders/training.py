"""What the training benchmark tells a contender, and how every contender runs and reports its steps.

A contender is a module that ends in `if __name__ == "__main__": run_worker(worker)`; its argument is a job in JSON, the
last line that it prints is its report. Nothing here needs more than the standard library and torch: a contender may run
in an environment of its own.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .protocol import STARTED_VARIABLE

LENGTH, SKIPPED = 256, 2


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run."""

    way: str
    checkpoint: str
    run: str
    cap_nbytes: int
    batch: int
    clip: float | None
    steps: int


def started() -> None:
    """Imports are done: the harness takes its hands off the memory that it held meanwhile."""
    Path(os.environ[STARTED_VARIABLE]).touch()


def batch_of(job: Job, step: int) -> Any:
    """Token ids [batch, LENGTH], fixed by the number of the step."""
    import torch

    return torch.randint(0, 8192, (job.batch, LENGTH), generator=torch.Generator().manual_seed(step))


def moved() -> tuple[int, int]:
    """Bytes that this process has read from and written to drives."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"]), int(lines["write_bytes"])


def measure_steps(job: Job, forward: Any, backward: Any, update: Any, settle: Any) -> dict[str, Any]:
    """Run the steps; seconds of each phase, bytes of each step."""
    rows, losses = [], []
    for step in range(job.steps):
        ids = batch_of(job, step)
        io, start = moved(), time.perf_counter()
        loss = forward(ids)
        losses.append(float(loss.detach()))
        first = time.perf_counter()
        backward(loss)
        second = time.perf_counter()
        update()
        third = time.perf_counter()
        if step == job.steps - 1:
            settle()
        after, end = moved(), time.perf_counter()
        rows.append((end - start, first - start, second - first, third - second, after[0] - io[0], after[1] - io[1]))
    steady = rows[SKIPPED:]
    names = ("step_s", "forward_s", "backward_s", "update_s", "read_nbytes", "written_nbytes")
    found = {name: statistics.mean(row[i] for row in steady) for i, name in enumerate(names)}
    return {**found, "best_s": min(row[0] for row in steady[:-1] or steady), "losses": losses}


def run_worker(worker: Callable[[Job], dict[str, Any]]) -> None:
    """Do the job on this process's command line and print the report."""
    report = worker(Job(**json.loads(sys.argv[1])))
    print(json.dumps(report), flush=True)
