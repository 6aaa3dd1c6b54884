"""What the profiler costs: steps with and without it, in alternating order, and an interval for their ratio.

    python -m benchmarks.profiler_overhead                                # the streamed reference model, and a training
    python -m benchmarks.profiler_overhead --workloads training --pairs 30 --json result.json

Each pair runs the same steps once plain and once recorded, in an order that alternates from pair to pair; its ratio is
recorded / plain, of the whole time of each half, since some steps are looked at closer than others. The figure is the
median of the ratios, its interval the 95 % one of the sign test: it assumes nothing about how a noisy disk spreads
them. Beside it the median of the ratios of median steps: what a step costs that is like most. Entering and leaving the
profiler is not in the steps.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import Any

from .streams import Figure, Job, Runner, arguments_of, finish, made_by, main_or_worker, table, weights_of

GOALS = {"light": 1.01, "full": 1.05}
WORKLOADS = ("streamed", "resident", "training")
MOST_CONFIDENCE = 0.95
WARM_UP = 3
UNUSUAL = 3
"""Steps of each half that do not count: the recorder looks at everything in the first ones, and at what is new."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One workload at one level."""

    workload: str
    level: str
    plain_s: float
    """Seconds per step, median."""
    ratios: list[float]
    """Of the time of all steps."""
    usual: list[float]
    """Of the median steps."""
    records: int
    """Per step."""
    nbytes: int
    """Of the file, per step."""
    own: float
    """What the recorder says of itself: CPU time over the time recorded."""

    @property
    def median(self) -> float:
        """Recorded over plain."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the median, from the binomial distribution of signs."""
        count, ordered = len(self.ratios), sorted(self.ratios)
        outside, rank = 0.0, 0
        while rank < count // 2 and 2 * (outside + comb(count, rank) / 2**count) <= 1 - MOST_CONFIDENCE:
            outside += comb(count, rank) / 2**count
            rank += 1
        low = max(rank - 1, 0)
        return ordered[low], ordered[count - 1 - low]


def streamed(job: Job) -> Callable[[], None]:
    """Decoding steps of the reference model within a budget."""
    import torch

    import penstock

    model = penstock.load(job["checkpoint"], device="cpu", max_memory={"host": job["host_nbytes"]})
    return _decoding(model, torch.randint(300, 1000, (1, 32)))


def resident(job: Job) -> Callable[[], None]:
    """Decoding steps of a small model that is not streamed: many modules, little work in each."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16)
    return _decoding(LlamaForCausalLM(config).eval(), torch.randint(300, 1000, (1, 32)))


def _decoding(model: Any, prompt: Any) -> Callable[[], None]:
    import torch

    def step() -> None:
        with torch.no_grad():
            output = model(input_ids=state["next"], past_key_values=state["cache"], use_cache=True)
        state["cache"], state["next"] = output.past_key_values, output.logits[:, -1:].argmax(-1)

    state: dict[str, Any] = {"next": prompt, "cache": None}
    return step


def training(job: Job) -> Callable[[], None]:
    """Steps of a plain training script: a transformer of 12 layers, AdamW, fp32."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True, dropout=0.0), 12)
    model = nn.Sequential(nn.Embedding(4096, 384), layers, nn.Linear(384, 4096))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 4096, (4, 128))

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()

    return step


def worker(job: Job) -> dict[str, Any]:
    """Run one workload at one level and report the ratios."""
    import penstock

    step = {"streamed": streamed, "resident": resident, "training": training}[job["workload"]](job)
    for _ in range(WARM_UP):
        step()

    def timed(context: AbstractContextManager[Any]) -> tuple[float, float]:
        """Seconds of the mean step, and of the median one."""
        with context:
            for _ in range(UNUSUAL):
                step()
            seconds = []
            for _ in range(job["steps"]):
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
            return statistics.mean(seconds), statistics.median(seconds)

    plain, ratios, usual = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(job["pairs"]):
            profiler = penstock.Profiler(Path(folder) / f"{number}.prof", level=job["level"])
            found = {}
            for recorded in (number % 2 == 0, number % 2 == 1):
                found[recorded] = timed(profiler if recorded else nullcontext())
            plain.append(found[False][1])
            ratios.append(found[True][0] / found[False][0])
            usual.append(found[True][1] / found[False][1])
        summary, nbytes = profiler.summary(), profiler.path.stat().st_size
    return {
        "plain_s": statistics.median(plain),
        "ratios": ratios,
        "usual": usual,
        "records": summary.recorded // (job["steps"] + UNUSUAL),
        "nbytes": nbytes // (job["steps"] + UNUSUAL),
        "own": summary.overhead or 0.0,
    }


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--levels", default="light,full", help="comma-separated (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=15, help="at least 10 (default: %(default)s)")
    parser.add_argument("--shape", choices=("reference", "tiny"), default="reference", help="of the streamed model")


STEPS = {"streamed": 3, "resident": 30, "training": 12}
"""Per half of a pair: two to eight seconds, and several turns of what is looked at in some steps only."""


COLUMNS = (
    "workload, level", "plain\nms/step", "slower by", "95 % interval", "median\nstep", "pairs", "records\n/step",
    "KiB\n/step", "own CPU",
)  # fmt: skip


def main() -> None:
    """Command line."""
    arguments = arguments_of("profiler_overhead", __doc__, _options)
    runner = Runner("benchmarks.profiler_overhead", timeout_s=arguments.timeout)
    rows = []
    for workload in arguments.workloads.split(","):
        job: dict[str, Any] = {"workload": workload, "pairs": arguments.pairs, "steps": STEPS[workload]}
        if workload == "streamed":
            shape = ("--shape", arguments.shape, "--no-gguf")
            checkpoint = made_by("benchmarks.reference_checkpoint", *shape, folder=arguments.dir)
            job |= {"checkpoint": str(checkpoint), "host_nbytes": weights_of(checkpoint)[1] * 9 // 20}
        for level in arguments.levels.split(","):
            rows.append(Row(workload=workload, level=level, **runner.run({**job, "level": level})))
    shown = [
        [
            f"{row.workload}, {row.level}",
            f"{row.plain_s * 1e3:.1f}",
            f"{row.median - 1:+.2%}",
            f"{row.interval[0] - 1:+.2%} … {row.interval[1] - 1:+.2%}",
            f"{statistics.median(row.usual) - 1:+.2%}",
            str(len(row.ratios)),
            str(row.records),
            f"{row.nbytes / 1024:.1f}",
            f"{row.own:.2%}",
        ]
        for row in rows
    ]
    figures = [
        Figure(name=f"{r.workload}, {r.level}: recorded / plain", value=r.median, goal=GOALS[r.level]) for r in rows
    ]
    finish(arguments, table("the profiler's cost", COLUMNS, shown), figures, [asdict(row) for row in rows])


if __name__ == "__main__":
    main_or_worker(main, worker)
