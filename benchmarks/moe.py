"""Decode a mixture of experts larger than memory, with penstock and with its peers, against the bound of its routing.

    python -m benchmarks.moe                             # 2.3 B parameters, a cap of 1.5 GiB, 128 tokens; needs root
    python -m benchmarks.moe --new-tokens 24 --contenders transformers,penstock        # short
    python -m benchmarks.moe --shape tiny --new-tokens 8                               # tries the harness out

Each contender runs in a process of its own, inside a memory cgroup, with dropped caches, and is given the same words;
the yardstick (transformers, everything resident) runs without a cap and records the routing of the text once. The raw
rate of the disk is measured before and after each run.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from .cgroup import CgroupUnavailableError
from .contenders.moe import MoeJob
from .inference import CHECKOUT, TRANSFORMERS, Contender, Harness, parse_nbytes, require_privileges
from .moe_checkpoint import SHAPES, MoeShape
from .moe_score import MoeScore, Needs, needs_of, render, score, summarise
from .reference_checkpoint import default_folder
from .scoreboard import GIB, YARDSTICK

PROMPT_LENGTH = 64
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(name=YARDSTICK, packages=TRANSFORMERS, capped=False, prefix="moe_"),
        Contender(name="penstock", packages={"penstock": "pip install -e .", **TRANSFORMERS}, prefix="moe_"),
        Contender(name="accelerate", packages={"accelerate": "pip install accelerate", **TRANSFORMERS}, prefix="moe_"),
        Contender(name="mmap", packages=TRANSFORMERS, prefix="moe_"),
    )
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--contenders", default=",".join(CONTENDERS), help="comma-separated, run in this order (default: %(default)s)"
    )
    parser.add_argument("--cap", type=parse_nbytes, default=3 * GIB // 2, help="memory cgroup (default: 1.5GiB)")
    parser.add_argument("--new-tokens", type=int, default=128, help="at least 2 (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=PROMPT_LENGTH, help="tokens at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=default_folder(), help="where the checkpoint lies or is made")
    parser.add_argument("--shape", default="reference", choices=sorted(SHAPES), help="tiny tries the harness out")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds per run (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=None, help="also write everything measured to this file")
    parser.add_argument("--force", action="store_true", help="overwrite the --json file")
    arguments = parser.parse_args()
    arguments.contenders = arguments.contenders.split(",")
    if unknown := [name for name in arguments.contenders if name not in CONTENDERS]:
        parser.error(f"unknown contenders {unknown}; there are {list(CONTENDERS)}")
    if arguments.new_tokens < 2 or arguments.rounds < 1 or arguments.prompt < 1:
        parser.error("--new-tokens must be at least 2, --rounds and --prompt at least 1")
    if arguments.json and arguments.json.exists() and not arguments.force:
        parser.error(f"{arguments.json} exists; add --force to overwrite it")
    return arguments


def prepare_job(arguments: argparse.Namespace) -> MoeJob:
    """Make the checkpoint if need be, in a process of its own: mapped libraries here would survive dropped caches."""
    command = [sys.executable, "-m", "benchmarks.moe_checkpoint", "--shape", arguments.shape]
    command += ["--dir", str(arguments.dir.resolve())]
    made = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=False)
    if made.returncode:
        sys.exit(made.returncode)
    checkpoint = Path(made.stdout.splitlines()[-1])
    text = f"{arguments.seed}-{arguments.prompt}-{arguments.new_tokens}"
    return MoeJob(
        checkpoint=checkpoint,
        gguf=Path(os.devnull),
        scratch=checkpoint.parent,
        cap_nbytes=arguments.cap,
        batch=1,
        prompt_length=arguments.prompt,
        new_tokens=arguments.new_tokens,
        shape=arguments.shape,
        seed=arguments.seed,
        trace=checkpoint.parent / f"{checkpoint.name}-{text}.trace",
    )


def bounds(job: MoeJob, shape: MoeShape, weights_nbytes: int) -> Needs | None:
    """What a token needs to read; None where the routing was never recorded."""
    if not job.trace.exists():
        return None
    return needs_of(job.trace, shape, cap_nbytes=job.cap_nbytes, weights_nbytes=weights_nbytes)


def write_json(
    file: Path, arguments: argparse.Namespace, job: MoeJob, needs: Needs | None, scores: Sequence[MoeScore]
) -> None:
    """Everything measured and derived; sizes in bytes, times in seconds."""
    settings = {name: value for name, value in {**vars(arguments), **asdict(job)}.items() if name != "force"}
    content = {
        "settings": settings,
        "needs": None if needs is None else asdict(needs),
        "scores": [one.to_json() for one in scores],
    }
    file.write_text(json.dumps(content, indent=2, default=str) + "\n")


def main() -> None:
    """Command line; exit code 1 when a contender that is installed failed."""
    arguments = parse_arguments()
    progress = Console(stderr=True)
    shape = SHAPES[arguments.shape]
    try:
        require_privileges(arguments.cap)
        job = prepare_job(arguments)
        harness = Harness(job, timeout_s=arguments.timeout, console=progress)
        attempts = [
            harness.attempt(CONTENDERS[name], 1, number)
            for number in range(1, arguments.rounds + 1)
            for name in arguments.contenders
        ]
    except (CgroupUnavailableError, OSError) as error:
        sys.exit(f"error: {error}")
    weights_nbytes = sum(file.stat().st_size for file in job.checkpoint.glob("*.safetensors"))
    needs = bounds(job, shape, weights_nbytes)
    scores = score(attempts, needs, expert_nbytes=shape.expert_nbytes, yardstick=YARDSTICK)
    title = (
        f"{job.checkpoint.name} checkpoint, {weights_nbytes / GIB:.2f} GiB, cap {arguments.cap / GIB:.2f} GiB, prompt "
        f"{arguments.prompt}, {arguments.new_tokens} new tokens, {arguments.rounds} round(s)"
    )
    out = Console(width=None if sys.stdout.isatty() else 180)
    out.print(render(scores, title=title))
    if needs is None:
        out.print("no bound: the routing of this text was not recorded; run transformers, too", highlight=False)
    else:
        out.print(
            f"room for {needs.capacity} of {shape.layer_count * shape.expert_count} experts; a token misses "
            f"{needs.cached / shape.expert_nbytes:.1f} with penstock's policy, "
            f"{needs.page_cache / shape.expert_nbytes:.1f} with one pool by last use, "
            f"{needs.foreseen / shape.expert_nbytes:.1f} with the future known",
            highlight=False,
        )
    for line in summarise(scores):
        out.print(line, highlight=False)
    if arguments.json:
        write_json(arguments.json, arguments, job, needs, scores)
    sys.exit(any(attempt.failure and not attempt.not_installed for attempt in attempts))


if __name__ == "__main__":
    main()
