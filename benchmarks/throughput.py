"""Tokens per second of many prompts through a model larger than memory, against the machine's bound and others.

    python -m benchmarks.throughput                      # 64 prompts of 32 to 128 tokens, 32 new ones; needs root
    python -m benchmarks.throughput --shape tiny --cap 1GiB --prompts 8 --new-tokens 4      # tries the harness out

penstock runs all prompts by `generate_many`. One at a time is estimated from a few prompts. accelerate is tried at
growing batches, each by a part of the prompts, until one does not fit. The resident model runs without a cap, in
batches as large as penstock's: its time is the compute of the bound. Each runs in a process of its own, with dropped
caches; the raw rate of the disk is measured before and after.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .cgroup import CgroupUnavailableError, MemoryCgroup
from .contenders.many import ManyJob, ManyReport
from .contenders.protocol import STARTED_VARIABLE
from .inference import ProvidedMemory, _watch, drop_caches, parse_nbytes, require_privileges
from .raw_disk import best_read_rate
from .reference_checkpoint import SHAPES, default_folder
from .scoreboard import FRAMEWORK_NBYTES, GIB

CHECKOUT = Path(__file__).parents[1]
BATCHES = (1, 2, 4, 8, 16, 32, 64)
GOAL_DISTANCE, GOAL_OVER_SINGLE, GOAL_OVER_ACCELERATE = 1.15, 8.0, 4.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run of one contender, or why there was none."""

    way: str
    batch: int
    report: ManyReport | None
    failure: str
    peak_anonymous_nbytes: int
    disk_nbytes_per_s: float
    """The better rate of before and after."""

    @property
    def tokens_per_s(self) -> float:
        """0 where it failed."""
        return self.report.tokens / self.report.seconds if self.report else 0.0


def run_once(way: str, job: ManyJob, *, capped: bool, timeout_s: float, console: Console) -> Outcome:
    """One contender in a process of its own; never raises for its failure."""
    console.print(f"{way}: {job.count} prompts, batch {job.batch} ...", highlight=False)
    weights = sorted(job.checkpoint.glob("*.safetensors"))
    before = best_read_rate(weights).nbytes_per_s
    with ExitStack() as stack:
        group = stack.enter_context(MemoryCgroup(cap_nbytes=job.cap_nbytes)) if capped else None
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=job.scratch, prefix="scratch-")))
        memory = stack.enter_context(ProvidedMemory(job.cap_nbytes))
        output = stack.enter_context(tempfile.TemporaryFile("w+"))
        errors = stack.enter_context(tempfile.TemporaryFile("w+"))
        drop_caches()
        started = scratch / "started"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", STARTED_VARIABLE: str(started)}
        command = [sys.executable, "-m", "benchmarks.contenders.many_run", way]
        command += replace(job, scratch=scratch).command_line()
        start = group.popen if group else _popen
        process = start(command, stdout=output, stderr=errors, cwd=CHECKOUT, env=environment)
        peak, timed_out = _watch(process, timeout_s, started, memory)
        killed = group is not None and group.usage().oom_kill_count > 0
        output.seek(0)
        errors.seek(0)
        said, complained = output.read().splitlines(), errors.read().splitlines()
    report, failure = None, ""
    if timed_out:
        failure = f"timed out after {timeout_s:.0f} s"
    elif killed:
        failure = "killed: over the cap"
    elif process.returncode or not said:
        failure = f"failed ({process.returncode}): {complained[-1] if complained else 'no message'}"
    else:
        report = ManyReport(**json.loads(said[-1]))
    after = best_read_rate(weights).nbytes_per_s
    return Outcome(
        way=way,
        batch=job.batch,
        report=report,
        failure=failure,
        peak_anonymous_nbytes=peak,
        disk_nbytes_per_s=max(before, after),
    )


def _popen(command: Sequence[str], **options: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, text=True, **options)  # type: ignore[call-overload,no-any-return]


def measure(arguments: argparse.Namespace, job: ManyJob, console: Console) -> list[Outcome]:
    """Every contender in turn."""

    def once(way: str, job: ManyJob, *, capped: bool = True) -> Outcome:
        return run_once(way, job, capped=capped, timeout_s=arguments.timeout, console=console)

    outcomes = [once("penstock", job)]
    if arguments.single:
        outcomes.append(once("single", replace(job, batch=1, count=min(arguments.single, job.count))))
    if "accelerate" in arguments.peers:
        for batch in BATCHES:
            if batch > job.count:
                break
            found = once("accelerate", replace(job, batch=batch, count=batch))
            outcomes.append(found)
            if found.failure:
                break
    own = outcomes[0].report
    if "resident" in arguments.peers and own is not None:
        outcomes.append(once("resident", replace(job, batch=own.rows), capped=False))
    return outcomes


def distances(outcomes: Sequence[Outcome], *, weights_nbytes: int, cap_nbytes: int) -> dict[str, float | None]:
    """penstock's time over its bounds: max(bytes per sweep · sweeps / disk rate, compute of the resident model).

    `distance` counts as bytes per sweep the weights that cannot stay beside the sequences; `distance_weights_only`
    counts as if sequences took no memory.
    """
    first, resident = outcomes[0], next((one for one in outcomes if one.way == "resident"), None)
    if first.report is None:
        return {"distance": None, "distance_weights_only": None}
    compute_s = resident.report.seconds if resident is not None and resident.report else 0.0
    found: dict[str, float | None] = {}
    for name, sequences in (("distance", first.report.sequences_nbytes), ("distance_weights_only", 0)):
        stays = max(0, cap_nbytes - FRAMEWORK_NBYTES - sequences)
        read_s = max(0, weights_nbytes - stays) * first.report.sweeps / first.disk_nbytes_per_s
        bound = max(read_s, compute_s)
        found[name] = first.report.seconds / bound if bound else None
    return found


def render(outcomes: Sequence[Outcome]) -> Table:
    """One row per run."""
    table = Table()
    for name in ("run", "batch", "tokens", "seconds", "tokens/s", "sweeps", "peak anon GiB", "disk GiB/s", ""):
        table.add_column(name, justify="left" if name in ("run", "") else "right")
    for one in outcomes:
        report = one.report
        table.add_row(
            one.way + (" (estimate from a few)" if one.way == "single" else ""),
            str(one.batch),
            str(report.tokens) if report else "-",
            f"{report.seconds:.1f}" if report else "-",
            f"{one.tokens_per_s:.2f}" if report else "-",
            str(report.sweeps) if report else "-",
            f"{one.peak_anonymous_nbytes / GIB:.2f}",
            f"{one.disk_nbytes_per_s / GIB:.2f}",
            one.failure,
        )
    return table


def summarise(outcomes: Sequence[Outcome], found: dict[str, float | None]) -> list[str]:
    """The figures that count, each with its goal."""
    own = outcomes[0].tokens_per_s
    single = max((one.tokens_per_s for one in outcomes if one.way == "single"), default=0.0)
    best = max((one.tokens_per_s for one in outcomes if one.way == "accelerate"), default=0.0)
    lines = [f"{name} {value:.2f} (goal {GOAL_DISTANCE})" for name, value in found.items() if value is not None]
    if single:
        lines.append(f"{own / single:.1f} times one at a time (goal {GOAL_OVER_SINGLE:.0f})")
    if best:
        lines.append(f"{own / best:.1f} times accelerate at its best batch (goal {GOAL_OVER_ACCELERATE:.0f})")
    return lines


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--prompts", type=int, default=64, help="how many (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="for each (default: %(default)s)")
    parser.add_argument("--cap", type=parse_nbytes, default=3 * GIB, help="memory cgroup (default: 3GiB)")
    parser.add_argument("--single", type=int, default=2, help="prompts run one at a time (default: %(default)s)")
    parser.add_argument("--peers", default="accelerate,resident", help="comma-separated (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=default_folder(), help="where the checkpoint lies or is made")
    parser.add_argument("--shape", default="reference", choices=sorted(SHAPES))
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds per run (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=None, help="also write everything measured to this file")
    parser.add_argument("--force", action="store_true", help="overwrite the --json file")
    arguments = parser.parse_args()
    arguments.peers = [name for name in arguments.peers.split(",") if name]
    if unknown := [name for name in arguments.peers if name not in ("accelerate", "resident")]:
        parser.error(f"unknown peers {unknown}; there are accelerate and resident")
    if arguments.json and arguments.json.exists() and not arguments.force:
        parser.error(f"{arguments.json} exists; add --force to overwrite it")
    return arguments


def main() -> None:
    """Command line; exit code 1 when penstock failed."""
    arguments = parse_arguments()
    console = Console(stderr=True)
    command = [sys.executable, "-m", "benchmarks.reference_checkpoint", "--shape", arguments.shape, "--no-gguf"]
    made = subprocess.run(
        [*command, "--dir", str(arguments.dir.resolve())], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=False
    )
    if made.returncode:
        sys.exit(made.returncode)
    checkpoint = Path(made.stdout.splitlines()[0])
    job = ManyJob(
        checkpoint=checkpoint,
        scratch=checkpoint.parent,
        cap_nbytes=arguments.cap,
        first=0,
        count=arguments.prompts,
        batch=1,
        new_tokens=arguments.new_tokens,
    )
    try:
        require_privileges(arguments.cap)
        outcomes = measure(arguments, job, console)
    except (CgroupUnavailableError, OSError) as error:
        sys.exit(f"error: {error}")
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    found = distances(outcomes, weights_nbytes=weights, cap_nbytes=arguments.cap)
    out = Console(width=None if sys.stdout.isatty() else 160)
    out.print(render(outcomes))
    for line in summarise(outcomes, found):
        out.print(line, highlight=False)
    if arguments.json:
        content = {"settings": vars(arguments), "outcomes": [asdict(one) for one in outcomes], **found}
        arguments.json.write_text(json.dumps(content, indent=2, default=str) + "\n")
    sys.exit(bool(outcomes[0].failure))


if __name__ == "__main__":
    main()
