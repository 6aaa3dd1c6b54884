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
PHASES = ("forward_s", "backward_s", "update_s")


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
    """Run the steps; seconds and bytes of one, and seconds of its phases.

    A contender may go on with a step's update beside the next step. So seconds and bytes are counted from where the
    update of the last step that warms up has ended (`settle`) to where that of the last step has: whole steps, all of
    them, and nothing else. The best is of steps that begin beside the update of the one before.
    """
    assert job.steps > SKIPPED, job
    rows, losses = [], []
    for step in range(job.steps):
        if step == SKIPPED:
            settle()
            io, since = moved(), time.perf_counter()
        ids = batch_of(job, step)
        start = time.perf_counter()
        loss = forward(ids)
        losses.append(float(loss.detach()))
        first = time.perf_counter()
        backward(loss)
        second = time.perf_counter()
        update()
        third = time.perf_counter()
        rows.append((third - start, first - start, second - first, third - second))
    settle()
    steady, seconds = rows[SKIPPED:], time.perf_counter() - since
    read, written = (after - before for after, before in zip(moved(), io, strict=True))
    found = {name: statistics.mean(row[i] for row in steady) for i, name in enumerate(PHASES, 1)}
    found |= {"step_s": seconds / len(steady), "best_s": min(row[0] for row in steady[1:] or steady)}
    return {**found, "read_nbytes": read / len(steady), "written_nbytes": written / len(steady), "losses": losses}


def run_worker(worker: Callable[[Job], dict[str, Any]]) -> None:
    """Do the job on this process's command line and print the report."""
    report = worker(Job(**json.loads(sys.argv[1])))
    print(json.dumps(report), flush=True)
