"""Seconds to the first token from a cold start, in sweeps: how long reading all weights once takes at the raw rate.

    python -m benchmarks.first_token                    # the reference checkpoint under 3 GiB; needs root
    python -m benchmarks.first_token --shape tiny --rounds 1

The clock starts when the imports are done and the page cache has been dropped before the process began. It covers
everything else: the headers, the skeleton of the model, the plan, the first read of every layer and the prompt of 32
tokens.
"""

import argparse
import os
import statistics
from pathlib import Path

from rich.console import Console

from .cgroup import CgroupUnavailableError
from .contenders.protocol import Job
from .inference import CONTENDERS, PROMPT_LENGTH, ContenderFailedError, Harness, parse_nbytes, require_privileges
from .scoreboard import Attempt
from .streams import GIB, Figure, arguments_of, finish, made_by, main_or_worker, table, weights_of

GOAL_SWEEPS = 1.15
NEW_TOKENS = 2
"""The second only because the shared report has a mean over decoded tokens."""


def sweeps(attempt: Attempt, weights_nbytes: int) -> float:
    """Time to the first token over the time of one sweep."""
    assert attempt.report is not None, "failed attempts are not scored"
    return attempt.report.token_s[0] / (weights_nbytes / attempt.disk_nbytes_per_s)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", choices=("reference", "tiny"), default="reference", help="tiny tries the harness out"
    )
    parser.add_argument("--cap", type=parse_nbytes, default=3 * GIB, help="memory cgroup (default: 3GiB)")
    parser.add_argument("--rounds", type=int, default=3, help="cold starts (default: %(default)s)")


def main() -> None:
    """Command line."""
    arguments = arguments_of("first_token", __doc__, _options)
    try:
        require_privileges(arguments.cap)
    except CgroupUnavailableError as error:
        raise OSError(str(error)) from error
    checkpoint = made_by(
        "benchmarks.reference_checkpoint", "--shape", arguments.shape, "--no-gguf", folder=arguments.dir
    )
    _, weights_nbytes = weights_of(checkpoint)
    job = Job(
        checkpoint=checkpoint,
        gguf=Path(os.devnull),
        scratch=checkpoint.parent,
        cap_nbytes=arguments.cap,
        batch=1,
        prompt_length=PROMPT_LENGTH,
        new_tokens=NEW_TOKENS,
    )
    harness = Harness(job, timeout_s=arguments.timeout, console=Console(stderr=True))
    attempts = [harness.attempt(CONTENDERS["penstock"], 1, number) for number in range(1, arguments.rounds + 1)]
    if failed := next((attempt for attempt in attempts if attempt.report is None), None):
        raise ContenderFailedError(failed.failure)
    rows = [
        [
            str(attempt.round_number),
            f"{attempt.report.loaded_s:.2f}",
            f"{attempt.report.token_s[0]:.2f}",
            f"{attempt.disk_nbytes_per_s / GIB:.2f}",
            f"{weights_nbytes / attempt.disk_nbytes_per_s:.2f}",
            f"{sweeps(attempt, weights_nbytes):.2f}",
        ]
        for attempt in attempts
        if attempt.report
    ]
    columns = ("round", "load s", "first token s", "disk\nGiB/s", "sweep s", "sweeps")
    title = f"first token of {weights_nbytes / GIB:.2f} GiB under {arguments.cap / GIB:.2f} GiB, from a cold start"
    median = statistics.median(sweeps(attempt, weights_nbytes) for attempt in attempts)
    figure = Figure(name="first token, median", value=median, goal=GOAL_SWEEPS, unit="sweeps")
    finish(arguments, table(title, columns, rows), [figure], rows)


def _no_worker(job: object) -> dict[str, object]:
    raise ValueError(f"this benchmark has no worker of its own: {job}")


if __name__ == "__main__":
    main_or_worker(main, _no_worker)
