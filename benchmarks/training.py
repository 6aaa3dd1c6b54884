"""Fine-tuning under a memory cap: seconds per step, memory and bytes moved, against the bound and the resident run.

    python -m benchmarks.training                            # S, without and with clipping; needs root for the cgroup
    python -m benchmarks.training --size M --cap 3GiB --batch 1 --json training.json
    python -m benchmarks.training --contenders penstock,resident

Random Llama-shaped models (vocabulary 8192, feed-forward 2.6875 x hidden, heads 64 wide): S = 12 x 1024 (0.17 B
parameters), M = 24 x 2048 (1.25 B), L = 32 x 2560 (2.6 B). AdamW with an fp32 master, bf16 weights. Each contender runs
in a process of its own, penstock in a cgroup with the cap, the resident run (plain PyTorch with the same arithmetic)
without one, where it fits. DeepSpeed (ZeRO-3, optimizer states on the drive; as it comes, and with smaller buffers) is
tried under the same cap and then under those of --deepspeed-cap, in turn, until it lives; `python -m
benchmarks.deepspeed_environment` installs it. In the same run the parts of the bound are measured: the rate of the
update and of the checksum on all cores, and reading and writing the drive at once.

"committing" is penstock that calls `penstock.save` after every step: its goal is 3 % over what its further bytes take.

bound without clipping: max(compute + update + checksum, bytes / mixed rate)
bound with clipping:    backward + max(forward + update + checksum, bytes / mixed rate)
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .cgroup import MemoryCgroup
from .contenders.protocol import STARTED_VARIABLE
from .contenders.training import LENGTH, Job
from .deepspeed_environment import Environment, own_environment
from .deepspeed_environment import environment as deepspeed_environment
from .inference import CHECKOUT, ProvidedMemory, _watch, drop_caches, parse_nbytes, require_privileges
from .reference_checkpoint import default_folder
from .scoreboard import GIB
from .streams import Figure, arguments_of, finish, table

SIZES = {"S": (12, 1024), "M": (24, 2048), "L": (32, 2560)}
CAPS = {"S": GIB, "M": 3 * GIB, "L": 4 * GIB}
DEEPSPEED_CAPS = "2GiB,3GiB,4GiB,6GiB,8GiB"
KILLED = "killed: over the cap"
COLUMNS = (
    "run", "s/step (best)", "forward + backward + update", "tokens/s", "bytes/parameter\nread / written",
    "peak GiB", "bound s", "distance",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A module in `benchmarks.contenders`, and how it is run."""

    module: str
    capped: bool = True
    environment: Callable[[Path], Environment] = own_environment
    """What runs it, from the folder of the benchmark."""


CONTENDERS = {
    "penstock": Contender(module="training_penstock"),
    "committing": Contender(module="training_penstock"),
    "resident": Contender(module="training_resident", capped=False),
    "deepspeed": Contender(module="training_deepspeed", environment=deepspeed_environment),
    "deepspeed-tuned": Contender(module="training_deepspeed", environment=deepspeed_environment),
}
DEEPSPEED = [way for way in CONTENDERS if way.startswith("deepspeed")]
RATES = Contender(module="training_rates", capped=False)


def shape(size: str) -> dict[str, Any]:
    """The config of a size."""
    layers, hidden = SIZES[size]
    return {
        "vocab_size": 8192,
        "hidden_size": hidden,
        "intermediate_size": round(2.6875 * hidden),
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "dtype": "bfloat16",
    }


def make(size: str, folder: Path) -> Path:
    """The checkpoint, made once, by a process of its own."""
    path = folder / f"training-{size}-v1"
    if not (path / "done").exists():
        code = (
            "import sys, json, torch; from transformers import LlamaConfig, LlamaForCausalLM; torch.manual_seed(0);"
            "torch.set_default_dtype(torch.bfloat16);"
            "m = LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[1]))); m.save_pretrained(sys.argv[2])"
        )
        subprocess.run([sys.executable, "-c", code, json.dumps(shape(size)), str(path)], check=True)
        (path / "done").touch()
    return path


def run(contender: Contender, job: Job, *, timeout_s: float) -> dict[str, Any]:
    """One worker; its report, its peak, or why there is none."""
    under = f" under {job.cap_nbytes / GIB:g} GiB" if contender.capped else ""
    print(f"{job.way}, batch {job.batch} x {LENGTH}, clip {job.clip}{under} ...", file=sys.stderr, flush=True)
    environment = contender.environment(Path(job.run))
    if environment.missing:
        return {"failure": f"not installed: {environment.missing}", "peak_nbytes": 0, "cap_nbytes": None}
    with ExitStack() as stack:
        group = stack.enter_context(MemoryCgroup(cap_nbytes=job.cap_nbytes)) if contender.capped else None
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=job.run, prefix="training-")))
        memory = stack.enter_context(ProvidedMemory(job.cap_nbytes))
        output, errors = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
        drop_caches()
        started = scratch / "started"
        inside = scratch / "run"
        if contender is RATES:
            inside.mkdir()
        command = [str(environment.python), "-m", f"benchmarks.contenders.{contender.module}"]
        command.append(json.dumps(asdict(replace(job, run=str(inside)))))
        variables = {**os.environ, **environment.variables, "HF_HUB_OFFLINE": "1", STARTED_VARIABLE: str(started)}
        popen: Any = group.popen if group else partial(subprocess.Popen, text=True)
        process = popen(command, stdout=output, stderr=errors, cwd=CHECKOUT, env=variables)
        anonymous, timed_out = _watch(process, timeout_s, started, memory)
        output.seek(0)
        errors.seek(0)
        said, complained = output.read().splitlines(), errors.read().strip().splitlines()
        usage = group.usage() if group else None
    peak = (usage and usage.peak_nbytes) or anonymous
    report: dict[str, Any] = {"peak_anonymous_nbytes": anonymous, "peak_nbytes": peak}
    report["cap_nbytes"] = job.cap_nbytes if contender.capped else None
    if usage is not None and usage.oom_kill_count:
        report["failure"] = KILLED
    elif timed_out:
        report["failure"] = f"timed out after {timeout_s:.0f} s"
    elif process.returncode or not said:
        report["failure"] = f"failed ({process.returncode}): {complained[-1] if complained else 'no message'}"
    else:
        report |= json.loads(said[-1])
    return report


def bound_s(report: dict[str, Any], resident: dict[str, Any], rates: dict[str, Any], *, clip: bool) -> float:
    """Seconds that no schedule on this machine could beat."""
    parameters = report["parameters"]
    update = parameters / rates["update_per_s"] + 2 * 12 * parameters / rates["checksum_per_s"]
    disk = (report["read_nbytes"] + report["written_nbytes"]) / rates["mixed_rate"]
    forward, backward = resident["forward_s"], resident["backward_s"]
    return float(backward + max(forward + update, disk) if clip else max(forward + backward + update, disk))


@dataclass(frozen=True, kw_only=True)
class Case:
    """What all contenders did with one batch, clipped or not."""

    name: str
    tokens: int
    clip: bool
    rates: dict[str, Any]
    reports: Sequence[tuple[str, dict[str, Any]]]
    """With the names of their contenders; one that was killed is there again with a larger cap."""

    def done(self, way: str) -> dict[str, Any] | None:
        """The report of a contender that was run and came to its end."""
        return next((report for name, report in self.reports if name == way and "failure" not in report), None)

    def bound(self) -> float | None:
        """Seconds, from the bytes of penstock and the computing of the resident run; None unless both ended."""
        ours, resident = self.done("penstock"), self.done("resident")
        return bound_s(ours, resident, self.rates, clip=self.clip) if ours and resident else None

    def rows(self) -> list[list[str]]:
        """Of the table: one for each contender."""
        bound = self.bound()
        return [self._row(way, report, bound) for way, report in self.reports]

    def _row(self, way: str, report: dict[str, Any], bound: float | None) -> list[str]:
        cap = report["cap_nbytes"]
        name = f"{self.name}: {way}" + (f", cap {cap / GIB:g} GiB" if cap else "")
        peak = f"{report['peak_nbytes'] / GIB:.2f}"
        if "failure" in report:
            return [name, report["failure"], "", "", "", peak, "", ""]
        per = report["parameters"]
        return [
            name,
            f"{report['step_s']:.2f} ({report['best_s']:.2f})",
            f"{report['forward_s']:.2f} + {report['backward_s']:.2f} + {report['update_s']:.2f}",
            f"{self.tokens / report['step_s']:.0f}",
            f"{report['read_nbytes'] / per:.1f} / {report['written_nbytes'] / per:.1f}",
            peak,
            f"{bound:.2f}" if bound else "",
            f"{report['step_s'] / bound:.2f}" if bound else "",
        ]

    def figures(self) -> list[Figure]:
        """Goals of penstock: against the bound, the resident run and DeepSpeed, and itself with commits."""
        return [*self._against_others(), *self._of_commits()]

    def _of_commits(self) -> list[Figure]:
        """What commits cost beyond the bytes that they write."""
        plain, committing = self.done("penstock"), self.done("committing")
        if plain is None or committing is None:
            return []
        more = max(committing["written_nbytes"] - plain["written_nbytes"], 0)
        least = plain["step_s"] + more / self.rates["write_rate"]
        return [Figure(name=f"a commit per step, {self.name}", value=committing["step_s"] / least, goal=1.03)]

    def _against_others(self) -> list[Figure]:
        ours, resident, bound = self.done("penstock"), self.done("resident"), self.bound()
        if ours is None:
            return []
        found = []
        if resident is not None and bound is not None:
            print(f"{self.name}: losses equal: {ours['losses'] == resident['losses']}", file=sys.stderr)
            found.append(Figure(name=f"distance, {self.name}", value=ours["step_s"] / bound, goal=1.15))
            over = ours["step_s"] / resident["step_s"]
            found.append(Figure(name=f"over resident, {self.name}", value=over, goal=1.15))
        for way in DEEPSPEED:
            if theirs := self.done(way):
                apart = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
                print(f"{self.name}: losses of {way} differ by at most {apart:.2g}", file=sys.stderr)
                slower, memory = theirs["step_s"] / ours["step_s"], ours["peak_nbytes"] / theirs["peak_nbytes"]
                found.append(Figure(name=f"times as fast as {way}, {self.name}", value=slower, goal=2.2, at_least=True))
                found.append(Figure(name=f"memory over {way}'s, {self.name}", value=memory, goal=1 / 6))
        return found


def contenders_of(text: str) -> Sequence[str]:
    """Names from "penstock,resident"."""
    names = text.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise argparse.ArgumentTypeError(f"unknown contenders {unknown}; there are {list(CONTENDERS)}")
    return names


def caps_of(text: str) -> Sequence[int]:
    """Bytes, ascending, from "2GiB,4GiB"."""
    return sorted(map(parse_nbytes, text.split(",")))


def options(parser: argparse.ArgumentParser) -> None:
    """What can be chosen."""
    parser.add_argument("--size", choices=sorted(SIZES), default="S")
    parser.add_argument("--cap", type=parse_nbytes, default=None, help="memory cgroup (default: 1, 3, 4 GiB)")
    parser.add_argument("--batch", default="1,4", help="comma-separated, of 256 tokens each (default: %(default)s)")
    parser.add_argument("--clip", default="none,1.0", help="comma-separated (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--contenders", type=contenders_of, default=list(CONTENDERS),
        help=f"comma-separated, run in this order (default: {','.join(CONTENDERS)})",
    )  # fmt: skip
    parser.add_argument(
        "--deepspeed-cap", type=caps_of, default=caps_of(DEEPSPEED_CAPS),
        help=f"comma-separated, tried in turn once DeepSpeed is killed under --cap (default: {DEEPSPEED_CAPS})",
    )  # fmt: skip


def reports_of(arguments: argparse.Namespace, job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    """What every contender that was chosen did, DeepSpeed under one cap after another until it is not killed."""
    for way in arguments.contenders:
        larger = [cap for cap in arguments.deepspeed_cap if cap > job.cap_nbytes] if way in DEEPSPEED else []
        for cap in (job.cap_nbytes, *larger):
            report = run(CONTENDERS[way], replace(job, way=way, cap_nbytes=cap), timeout_s=arguments.timeout)
            yield way, report
            if report.get("failure") != KILLED:
                break


def measure(arguments: argparse.Namespace, job: Job, clip: str) -> Case:
    """One batch, clipped or not."""
    return Case(
        name=f"{arguments.size}, {job.batch} x {LENGTH}, clip {clip}",
        tokens=job.batch * LENGTH,
        clip=job.clip is not None,
        rates=run(RATES, replace(job, way="rates"), timeout_s=arguments.timeout),
        reports=list(reports_of(arguments, job)),
    )


def main() -> None:
    """Command line."""
    arguments = arguments_of("training", __doc__, options)
    cap = arguments.cap or CAPS[arguments.size]
    require_privileges(cap)
    folder = arguments.dir or default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = make(arguments.size, folder)
    cases = []
    for batch in map(int, arguments.batch.split(",")):
        for text in arguments.clip.split(","):
            job = Job(
                way="", checkpoint=str(checkpoint), run=str(folder), cap_nbytes=cap, batch=batch,
                clip=None if text == "none" else float(text), steps=arguments.steps,
            )  # fmt: skip
            cases.append(measure(arguments, job, text))
    rows = [row for case in cases for row in case.rows()]
    figures = [figure for case in cases for figure in case.figures()]
    shown = table(f"training under {cap / GIB:g} GiB", COLUMNS, rows)
    finish(arguments, shown, figures, [asdict(case) for case in cases])


if __name__ == "__main__":
    main()
