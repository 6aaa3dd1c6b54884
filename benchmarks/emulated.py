"""The reference checkpoint on an emulated device: weights in three tiers, a slow link, and how busy it is kept.

    python -m benchmarks.emulated                          # device 2 GiB, link 1 GiB/s, host half the weights
    python -m benchmarks.emulated --shape tiny --device-budget 8MiB --link 64MiB

Resident runs on the CPU (the emulated device computes with it too) and is the yardstick for tokens and for t_compute.
"""

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from .contenders.protocol import FIRST_PROMPT_ID
from .inference import PROMPT_LENGTH, parse_nbytes
from .streams import (
    GIB,
    DiskAround,
    Figure,
    Job,
    Runner,
    arguments_of,
    finish,
    made_by,
    main_or_worker,
    table,
    weights_of,
)
from .sweeps import LEARNING, SweepClock

DISTANCE_GOAL = 1.10
BUSY_GOAL = 0.95


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run."""

    weights_nbytes: int
    device_nbytes: int
    host_nbytes: int
    link_nbytes_per_s: float
    t_compute_s: float
    disk: DiskAround
    tokens_equal: bool
    report: dict[str, Any]

    @property
    def sweeps(self) -> int:
        """Sweeps that count."""
        return len(self.report["sweeps_s"])

    @property
    def copied_nbytes(self) -> float:
        """Bytes copied to the device per sweep."""
        return float(self.report["copied_nbytes"]) / self.sweeps

    @property
    def bound_s(self) -> float:
        """The machine's: what the device cannot hold crosses the link, what device and host cannot is read."""
        link = max(0, self.weights_nbytes - self.device_nbytes) / self.link_nbytes_per_s
        disk = max(0, self.weights_nbytes - self.device_nbytes - self.host_nbytes) / self.disk.nbytes_per_s
        return max(link, disk, self.t_compute_s)

    @property
    def distance(self) -> float:
        """Seconds per sweep over the machine's bound."""
        return float(self.report["s_per_sweep"]) / self.bound_s

    @property
    def plan_distance(self) -> float:
        """The same over the bytes that were copied, at the stated rate."""
        return float(self.report["s_per_sweep"]) / max(self.copied_nbytes / self.link_nbytes_per_s, self.t_compute_s)

    @property
    def busy(self) -> float:
        """Share of the time in which the link carried bytes at its stated rate."""
        return float(self.report["copied_nbytes"]) / self.link_nbytes_per_s / float(self.report["elapsed_s"])

    @property
    def copying(self) -> float:
        """Share of the time covered by the timeline's copy records, which include waiting for a block's first bytes."""
        return float(self.report["copying_s"]) / float(self.report["elapsed_s"])


def worker(job: Job) -> dict[str, Any]:
    """Run one contender and report. `job`: checkpoint, device (None: resident), budgets, new_tokens."""
    import random

    import torch
    from transformers import AutoModelForCausalLM

    import penstock

    if job["device"] is None:
        model: Any = AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype="auto")
    else:
        budgets = {"device": job["device_nbytes"], "host": job["host_nbytes"]}
        model = penstock.load(job["checkpoint"], device=job["device"], max_memory=budgets)
    vocabulary = range(FIRST_PROMPT_ID, model.config.vocab_size)
    prompt = torch.tensor([random.Random(0).choices(vocabulary, k=PROMPT_LENGTH)])
    clock = SweepClock(model)
    tokens = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=job["new_tokens"], do_sample=False
    )
    clock.end()
    found = {"tokens": tokens.tolist(), **clock.report()}
    if job["device"] is not None:
        penstock.close(model)
    return found


def measure(arguments: argparse.Namespace) -> Result:
    """Both contenders.

    Raises ContenderFailedError when one fails.
    """
    runner = Runner("benchmarks.emulated", timeout_s=arguments.timeout)
    shape = ("--shape", arguments.shape, "--no-gguf")
    checkpoint = made_by("benchmarks.reference_checkpoint", *shape, folder=arguments.dir)
    files, weights_nbytes = weights_of(checkpoint)
    host_nbytes = arguments.host_budget or weights_nbytes // 2
    job = {"checkpoint": str(checkpoint), "device": None, "new_tokens": arguments.new_tokens}
    resident = runner.run(job)
    budgets = {"device_nbytes": arguments.device_budget, "host_nbytes": host_nbytes}
    device = f"emulated:h2d={arguments.link}B/s"
    report, disk = runner.run_steady({**job, **budgets, "device": device}, files, f"penstock on {device}")
    return Result(
        weights_nbytes=weights_nbytes,
        device_nbytes=arguments.device_budget,
        host_nbytes=host_nbytes,
        link_nbytes_per_s=float(arguments.link),
        t_compute_s=resident["s_per_sweep_median"],
        disk=disk,
        tokens_equal=report["tokens"] == resident["tokens"],
        report=report,
    )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", choices=("reference", "tiny"), default="reference", help="tiny tries the harness out"
    )
    parser.add_argument("--device-budget", type=parse_nbytes, default=2 * GIB, help="default: 2GiB")
    parser.add_argument("--host-budget", type=parse_nbytes, default=None, help="default: half the weights")
    parser.add_argument(
        "--link", type=parse_nbytes, default=GIB, help="bytes per second host to device (default: 1GiB)"
    )
    parser.add_argument("--new-tokens", type=int, default=8, help=f"more than {LEARNING + 1} (default: %(default)s)")


COLUMNS = (
    "weights\nGiB", "device\nGiB", "host\nGiB", "link GiB/s\nstated", "link GiB/s\nmeasured", "GiB copied\n/sweep",
    "GiB read\n/sweep", "s/sweep", "bound\ns/sweep", "compute\ns/sweep", "distance", "distance\n(copied)", "link busy",
    "copy records\nover time", "tokens\nequal",
)  # fmt: skip


def main() -> None:
    """Command line."""
    arguments = arguments_of("emulated", __doc__, _options)
    if arguments.new_tokens <= LEARNING + 1:
        raise OSError(f"--new-tokens must be more than {LEARNING + 1}: the first {LEARNING} sweeps are not counted")
    result = measure(arguments)
    report = result.report
    row = [
        f"{result.weights_nbytes / GIB:.2f}",
        f"{result.device_nbytes / GIB:.2f}",
        f"{result.host_nbytes / GIB:.2f}",
        f"{result.link_nbytes_per_s / GIB:.2f}",
        f"{(report['measured_link_nbytes_per_s'] or 0) / GIB:.2f}",
        f"{result.copied_nbytes / GIB:.3f}",
        f"{report['read_nbytes_per_sweep'] / GIB:.3f}",
        f"{report['s_per_sweep']:.3f}",
        f"{result.bound_s:.3f}",
        f"{result.t_compute_s:.3f}",
        f"{result.distance:.2f}",
        f"{result.plan_distance:.2f}",
        f"{result.busy:.1%}",
        f"{result.copying:.1%}",
        "yes" if result.tokens_equal else "no",
    ]
    figures = [
        Figure(name="distance", value=result.distance, goal=DISTANCE_GOAL),
        Figure(name="link busy", value=result.busy, goal=BUSY_GOAL, at_least=True),
    ]
    title = f"emulated device, {arguments.new_tokens} new tokens, the first {LEARNING} sweeps left out"
    finish(arguments, table(title, COLUMNS, [row]), figures, asdict(result))


if __name__ == "__main__":
    main_or_worker(main, worker)
