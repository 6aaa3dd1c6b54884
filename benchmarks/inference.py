"""Decode a model larger than memory with penstock and with its peers, in one run, against the machine's bound.

    python -m benchmarks.inference                       # every contender, batch 1 and 8, a cap of 3 GiB; needs root
    python -m benchmarks.inference --contenders penstock,transformers --batch 1 --rounds 3 --json result.json

Each contender runs in a process of its own, inside a memory cgroup, with dropped caches; the yardstick (transformers,
everything resident) runs without a cap. The raw rate of the disk is measured before and after each run.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from .cgroup import CgroupUnavailableError, MemoryCgroup
from .contenders.protocol import STARTED_VARIABLE, Job, Report
from .raw_disk import best_read_rate
from .scoreboard import GIB, STEADY_DISK, YARDSTICK, Attempt, Score, render, score

PROMPT_LENGTH = 32
MAX_REPEATS = 2
SAMPLE_INTERVAL_S = 0.02
RESIDENT_HEADROOM_NBYTES = 2 * GIB
CHECKOUT = Path(__file__).parents[1]
UNITS = {"": 1, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A script in `benchmarks.contenders` and what it needs."""

    name: str
    packages: dict[str, str]
    """Module that must be importable, and what installs it."""
    reads_gguf: bool = False
    capped: bool = True

    prefix: str = ""
    """Of its script's name."""

    @property
    def module(self) -> str:
        """What `python -m` runs."""
        return f"benchmarks.contenders.{self.prefix}{self.name.replace('.', '_')}_run"

    def missing(self) -> list[str]:
        """How to install what is not there; empty when the contender can run."""
        return [remedy for module, remedy in self.packages.items() if importlib.util.find_spec(module) is None]


TRANSFORMERS = {"torch": "pip install torch", "transformers": "pip install transformers"}
LLAMA_CPP_REMEDY = "apt install cmake g++; pip install llama-cpp-python==0.3.36"
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(name=YARDSTICK, packages=TRANSFORMERS, capped=False),
        Contender(name="penstock", packages={"penstock": "pip install -e .", **TRANSFORMERS}),
        Contender(name="accelerate", packages={"accelerate": "pip install accelerate", **TRANSFORMERS}),
        Contender(
            name="llama.cpp", packages={"llama_cpp": LLAMA_CPP_REMEDY, "gguf": "pip install gguf"}, reads_gguf=True
        ),
    )
}


class ContenderFailedError(RuntimeError):
    """A contender ended without a report; the message says how."""


class Harness:
    """Runs contenders one at a time on an otherwise quiet machine."""

    def __init__(self, job: Job, *, timeout_s: float, console: Console) -> None:
        """`job` is the work of every contender, up to the batch size."""
        self._job = job
        self._timeout_s = timeout_s
        self._console = console

    def attempt(self, contender: Contender, batch: int, round_number: int) -> Attempt:
        """One steady run of one contender: repeated while the disk changes its pace; never raises for a failure."""
        blank = Attempt(contender=contender.name, batch=batch, round_number=round_number, capped=contender.capped)
        if missing := contender.missing():
            return replace(blank, not_installed=True, failure=f"not installed: {'; '.join(missing)}")
        tries: list[Attempt] = []
        while len(tries) <= MAX_REPEATS:
            self._console.print(f"round {round_number}: {contender.name}, batch {batch} ...", highlight=False)
            try:
                latest = replace(self._measure(contender, blank), repeat_count=len(tries))
            except ContenderFailedError as error:
                return replace(blank, failure=str(error))
            tries.append(latest)
            if latest.failure or latest.disk_change <= STEADY_DISK:
                return latest
            again = "repeating" if len(tries) <= MAX_REPEATS else "keeping the steadiest run"
            self._console.print(
                f"  the raw disk rate changed by {latest.disk_change:.0%} around this run "
                f"({latest.disk_before_nbytes_per_s / GIB:.2f} then {latest.disk_after_nbytes_per_s / GIB:.2f} GiB/s); "
                + again,
                highlight=False,
                soft_wrap=True,
            )
        return replace(min(tries, key=lambda one: one.disk_change), repeat_count=MAX_REPEATS)

    def _measure(self, contender: Contender, blank: Attempt) -> Attempt:
        job = replace(self._job, batch=blank.batch)
        weights = [job.gguf] if contender.reads_gguf else sorted(job.checkpoint.glob("*.safetensors"))
        if not contender.capped:
            _require_memory(sum(file.stat().st_size for file in weights))
        before = best_read_rate(weights).nbytes_per_s
        with ExitStack() as stack:
            group = stack.enter_context(MemoryCgroup(cap_nbytes=job.cap_nbytes)) if contender.capped else None
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=job.scratch, prefix="scratch-"))
            memory = stack.enter_context(ProvidedMemory(job.cap_nbytes))
            drop_caches()
            report, failure, peak_nbytes = self._run(contender, replace(job, scratch=Path(scratch)), group, memory)
            usage = group.usage() if group else None
        if failure and usage and usage.oom_kill_count:
            failure = f"killed: over the cap ({usage.oom_kill_count} OOM kills)"
        return replace(
            blank,
            report=report,
            failure=failure,
            usage=usage,
            peak_anonymous_nbytes=peak_nbytes,
            disk_before_nbytes_per_s=before,
            disk_after_nbytes_per_s=best_read_rate(weights).nbytes_per_s,
        )

    def _run(
        self, contender: Contender, job: Job, group: MemoryCgroup | None, memory: "ProvidedMemory"
    ) -> tuple[Report | None, str, int]:
        """The report or the failure, and the highest anonymous memory seen, in bytes."""
        command = [sys.executable, "-m", contender.module, *job.command_line()]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        started = job.scratch / "started"
        environment[STARTED_VARIABLE] = str(started)
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            start = group.popen if group else _popen
            process = start(command, stdout=output, stderr=errors, cwd=CHECKOUT, env=environment)
            peak_nbytes, timed_out = _watch(process, self._timeout_s, started, memory)
            output.seek(0)
            errors.seek(0)
            if timed_out:
                return None, f"timed out: no result after {self._timeout_s:.0f} s", peak_nbytes
            if process.returncode:
                lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
                return None, f"failed ({process.returncode}): {lines[-1] if lines else 'no message'}", peak_nbytes
            return Report(**json.loads(output.read().splitlines()[-1])), "", peak_nbytes


def _popen(command: Sequence[str], **options: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, text=True, **options)  # type: ignore[call-overload,no-any-return]


def _watch(
    process: "subprocess.Popen[str]", timeout_s: float, started: Path, memory: "ProvidedMemory"
) -> tuple[int, bool]:
    """Wait for `process`, sampling its anonymous memory from outside; (peak bytes, whether it was given up on)."""
    status = Path(f"/proc/{process.pid}/status")
    deadline_s = time.monotonic() + timeout_s
    peak_kib = 0
    try:
        while process.poll() is None:
            if time.monotonic() > deadline_s:
                return peak_kib * 1024, True
            match = re.search(r"^RssAnon:\s+(\d+) kB", status.read_text(), re.MULTILINE)
            peak_kib = max(peak_kib, int(match[1]) if match else 0)  # a process that just ended has no such line
            if memory.held and started.exists():
                memory.release()
            time.sleep(SAMPLE_INTERVAL_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return peak_kib * 1024, False


def drop_caches() -> None:
    """Write back and forget the page cache of the whole machine; PermissionError without root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


class ProvidedMemory:
    """Memory that the host of a virtual machine has provided, kept until a contender's clock starts.

    Such a machine may hand free memory back to its host within seconds, and the first touch of it then costs several
    times a read from disk: that would measure the host. So another process holds as much as the contender may use while
    the contender imports its packages, and lets go of it when the clock starts.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._process: subprocess.Popen[str] | None = None

    @property
    def held(self) -> bool:
        """Whether it has not been let go of."""
        return self._process is not None

    def __enter__(self) -> "ProvidedMemory":
        script = (
            "import mmap, sys, time; n = int(sys.argv[1])\n"
            "m = mmap.mmap(-1, n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); m.madvise(mmap.MADV_HUGEPAGE)\n"
            "for at in range(0, n, 4096): m[at] = 1\n"
            "print('touched', flush=True); time.sleep(86400)"
        )
        command = [sys.executable, "-c", script, str(self._nbytes)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "touched":
            self.release()
            raise OSError(f"no room: {self._nbytes / GIB:.1f} GiB of memory could not be touched")
        return self

    def release(self) -> None:
        """Give it back to the kernel of this machine."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __exit__(self, *failure: object) -> None:
        self.release()


def _require_memory(weights_nbytes: int) -> None:
    """The yardstick runs uncapped: refuse rather than push the machine out of memory."""
    counters = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available_nbytes = int(counters["MemAvailable"].split()[0]) * 1024
    needed_nbytes = weights_nbytes + RESIDENT_HEADROOM_NBYTES
    if available_nbytes < needed_nbytes:
        raise ContenderFailedError(
            f"no room: resident needs {needed_nbytes / GIB:.1f} GiB of memory, {available_nbytes / GIB:.1f} available"
        )


def parse_nbytes(text: str) -> int:
    """Bytes from "3GiB", "1536MiB" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(MiB|GiB|)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 3GiB, 1536MiB, or bytes")
    return int(float(match[1]) * UNITS[match[2]])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--contenders", default=",".join(CONTENDERS), help="comma-separated, run in this order (default: %(default)s)"
    )
    parser.add_argument("--batch", default="1,8", help="comma-separated batch sizes (default: %(default)s)")
    parser.add_argument("--cap", type=parse_nbytes, default=3 * GIB, help="memory cgroup, e.g. 3GiB (default: 3GiB)")
    parser.add_argument("--new-tokens", type=int, default=8, help="at least 2 (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=None, help="where the checkpoint lies or is made (default: cache)")
    parser.add_argument(
        "--shape", default="reference", choices=("reference", "tiny"), help="tiny tries the harness out"
    )
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds per run (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=None, help="also write everything measured to this file")
    parser.add_argument("--force", action="store_true", help="overwrite the --json file")
    arguments = parser.parse_args()
    arguments.contenders = arguments.contenders.split(",")
    if unknown := [name for name in arguments.contenders if name not in CONTENDERS]:
        parser.error(f"unknown contenders {unknown}; there are {list(CONTENDERS)}")
    try:
        arguments.batch = [int(batch) for batch in arguments.batch.split(",")]
    except ValueError:
        parser.error(f"--batch takes numbers such as 1,8, not {arguments.batch!r}")
    if arguments.new_tokens < 2 or arguments.rounds < 1 or min(arguments.batch) < 1:
        parser.error("--new-tokens must be at least 2, --rounds and every --batch at least 1")
    if arguments.json and arguments.json.exists() and not arguments.force:
        parser.error(f"{arguments.json} exists; add --force to overwrite it")
    return arguments


def prepare_job(arguments: argparse.Namespace) -> Job:
    """Make the checkpoint if need be, in a process of its own: mapped libraries here would survive dropped caches."""
    llama = CONTENDERS["llama.cpp"]
    with_gguf = llama.name in arguments.contenders and not llama.missing()
    command = [sys.executable, "-m", "benchmarks.reference_checkpoint", "--shape", arguments.shape]
    command += ["--dir", str(arguments.dir.resolve())] if arguments.dir else []
    command += [] if with_gguf else ["--no-gguf"]
    made = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=False)
    if made.returncode:
        sys.exit(made.returncode)
    checkpoint, *gguf = (Path(line) for line in made.stdout.splitlines())
    return Job(
        checkpoint=checkpoint,
        gguf=gguf[0] if gguf else Path(os.devnull),
        scratch=checkpoint.parent,
        cap_nbytes=arguments.cap,
        batch=0,
        prompt_length=PROMPT_LENGTH,
        new_tokens=arguments.new_tokens,
    )


def require_privileges(cap_nbytes: int) -> None:
    """Fail early and clearly where caches cannot be dropped or no cgroup can be made."""
    with MemoryCgroup(cap_nbytes=cap_nbytes):
        pass
    if not os.access("/proc/sys/vm/drop_caches", os.W_OK):
        raise PermissionError("dropping the page cache needs root (/proc/sys/vm/drop_caches); run with sudo")


def write_json(file: Path, arguments: argparse.Namespace, job: Job, scores: Sequence[Score]) -> None:
    """Everything measured and derived; sizes in bytes, times in seconds."""
    settings = {name: value for name, value in {**vars(arguments), **asdict(job)}.items() if name != "force"}
    content = {"settings": settings, "scores": [one.to_json() for one in scores]}
    file.write_text(json.dumps(content, indent=2, default=str) + "\n")


def main() -> None:
    """Command line; exit code 1 when a contender that is installed failed."""
    arguments = parse_arguments()
    progress = Console(stderr=True)
    try:
        require_privileges(arguments.cap)
        job = prepare_job(arguments)
        harness = Harness(job, timeout_s=arguments.timeout, console=progress)
        attempts = [
            harness.attempt(CONTENDERS[name], batch, number)
            for number in range(1, arguments.rounds + 1)
            for batch in arguments.batch
            for name in arguments.contenders
        ]
    except (CgroupUnavailableError, OSError) as error:
        sys.exit(f"error: {error}")
    weights_nbytes = sum(file.stat().st_size for file in job.checkpoint.glob("*.safetensors"))
    scores = score(attempts, weights_nbytes=weights_nbytes, cap_nbytes=arguments.cap)
    title = (
        f"{job.checkpoint.name} checkpoint, {weights_nbytes / GIB:.2f} GiB, cap {arguments.cap / GIB:.2f} GiB, prompt "
        f"{PROMPT_LENGTH}, {arguments.new_tokens} new tokens, {arguments.rounds} round(s)"
    )
    width = None if sys.stdout.isatty() else 180
    Console(width=width).print(render(scores, title=title))
    if arguments.json:
        write_json(arguments.json, arguments, job, scores)
    sys.exit(any(attempt.failure and not attempt.not_installed for attempt in attempts))


if __name__ == "__main__":
    main()
