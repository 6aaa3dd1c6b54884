"""What the benchmarks of streaming share: a process per contender, the disk's rate around it, goals, a table.

A benchmark that uses this module is run twice over: `python -m benchmarks.NAME` is the harness, and the harness starts
`python -m benchmarks.NAME --worker '{…}'` for each contender, which prints one line of JSON.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .inference import CHECKOUT, MAX_REPEATS, ContenderFailedError
from .raw_disk import best_read_rate
from .scoreboard import GIB, STEADY_DISK

WORKER = "--worker"
Job = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class DiskAround:
    """The raw rate of the disk before and after one run, in bytes per second."""

    before_nbytes_per_s: float
    after_nbytes_per_s: float

    @property
    def nbytes_per_s(self) -> float:
        """The better of the two: the strictest bound."""
        return max(self.before_nbytes_per_s, self.after_nbytes_per_s)

    @property
    def steady(self) -> bool:
        """Whether the two agree well enough for the run between them to count."""
        return abs(self.before_nbytes_per_s - self.after_nbytes_per_s) <= STEADY_DISK * self.nbytes_per_s


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number and the goal it is held against."""

    name: str
    value: float
    goal: float
    at_least: bool = False
    """Whether the goal is a lower bound; an upper bound else."""
    unit: str = ""

    @property
    def reached(self) -> bool:
        """Whether the goal is met."""
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def __str__(self) -> str:
        sign, unit = "≥" if self.at_least else "≤", f" {self.unit}" if self.unit else ""
        verdict = "reached" if self.reached else "missed"
        return f"{self.name}: {self.value:.3g}{unit} (goal {sign} {self.goal:g}{unit}: {verdict})"


class Runner:
    """Runs the workers of one benchmark, one at a time.

    Args:
        module: What `python -m` runs.
        timeout_s: Seconds per run.
    """

    def __init__(self, module: str, *, timeout_s: float) -> None:
        self._module = module
        self._timeout_s = timeout_s
        self._console = Console(stderr=True)

    def run(self, job: Job) -> dict[str, Any]:
        """The report of one worker.

        Raises ContenderFailedError when it ends without one.
        """
        command = [sys.executable, "-m", self._module, WORKER, json.dumps(job)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        try:
            done = subprocess.run(
                command,
                cwd=CHECKOUT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=self._timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ContenderFailedError(f"timed out: no result after {self._timeout_s:.0f} s") from error
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise ContenderFailedError(f"failed ({done.returncode}): {lines[-1] if lines else 'no message'}")
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return report

    def run_steady(self, job: Job, files: Sequence[Path], label: str) -> tuple[dict[str, Any], DiskAround]:
        """The same between two measurements of the disk over `files`; again, at most twice, while its pace changes."""
        for number in range(MAX_REPEATS + 1):
            self._console.print(f"{label} ...", highlight=False)
            before = best_read_rate(files).nbytes_per_s
            report = self.run(job)
            disk = DiskAround(before_nbytes_per_s=before, after_nbytes_per_s=best_read_rate(files).nbytes_per_s)
            if disk.steady or number == MAX_REPEATS:
                break
            self._console.print("  the disk changed its pace around this run; repeating", highlight=False)
        return report, disk


def arguments_of(name: str, doc: str | None, extend: Callable[[argparse.ArgumentParser], None]) -> argparse.Namespace:
    """The command line of the benchmark `name`: what `extend` adds, and what all have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    extend(parser)
    parser.add_argument("--dir", type=Path, default=None, help="where checkpoints lie or are made (default: cache)")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds per run (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=None, help="also write everything measured to this file")
    parser.add_argument("--force", action="store_true", help="overwrite the --json file")
    arguments = parser.parse_args()
    if arguments.json and arguments.json.exists() and not arguments.force:
        parser.error(f"{arguments.json} exists; add --force to overwrite it")
    return arguments


def made_by(module: str, *options: str, folder: Path | None) -> Path:
    """The checkpoint folder that `python -m module options` makes or finds, in a process of its own.

    Raises ContenderFailedError when it cannot be made.
    """
    where = ["--dir", str(folder.resolve())] if folder else []
    command = [sys.executable, "-m", module, *options, *where]
    done = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ContenderFailedError(f"{module} failed ({done.returncode}); its message is above")
    return Path(done.stdout.splitlines()[0])


def weights_of(checkpoint: Path) -> tuple[list[Path], int]:
    """The files with the weights of a checkpoint, and their bytes."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return files, sum(file.stat().st_size for file in files)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table with one left column and numbers in the others."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    for row in rows:
        made.add_row(*row)
    return made


def finish(arguments: argparse.Namespace, shown: Table | None, figures: Sequence[Figure], measured: object) -> None:
    """Print the table and the figures against their goals, and write `--json`."""
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    if shown is not None:
        console.print(shown)
    for figure in figures:
        console.print(str(figure))
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "force"}
        goals = [{**asdict(figure), "reached": figure.reached} for figure in figures]
        content = {"settings": settings, "figures": goals, "measured": measured}
        arguments.json.write_text(json.dumps(content, indent=2, default=str) + "\n")


def main_or_worker(main: Callable[[], None], worker: Callable[[Job], dict[str, Any]]) -> None:
    """Be the harness, or the worker that the harness started."""
    if len(sys.argv) == 3 and sys.argv[1] == WORKER:
        print(json.dumps(worker(json.loads(sys.argv[2]))), flush=True)
        return
    try:
        main()
    except (ContenderFailedError, OSError) as error:
        sys.exit(f"error: {error}")


__all__ = [
    "GIB",
    "DiskAround",
    "Figure",
    "Job",
    "Runner",
    "arguments_of",
    "finish",
    "made_by",
    "main_or_worker",
    "table",
    "weights_of",
]
