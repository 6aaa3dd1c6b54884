"""What the profiler costs: steps with and without it, in alternating order, and an interval for their ratio.

    python -m benchmarks.profiler_overhead                                # the streamed reference model, and a training
    python -m benchmarks.profiler_overhead --workloads training --pairs 30 --json result.json

Each pair runs the same steps once plain and once recorded, in an order that alternates from pair to pair; its ratio is
recorded / plain, of the whole time of each half, since some steps are looked at closer than others. The median of the
ratios has the 95 % interval of the sign test: it assumes nothing about how a noisy disk spreads them.

A shared machine gives one step 10 % more than the next for reasons of its own, and hundreds of pairs would be needed to
see a percent. What it cannot do is make a step faster than it is. So the figure that is held against the goal compares
fast steps, the lower quartiles: those of steps that were looked at and of steps that were not, weighed by how many
there were of each, over that of plain steps. Its interval is the 95 % one of 2000 bootstrap samples of whole pairs.
Entering and leaving the profiler is not in the steps, nor are the first ones of each recording.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import Any

from .streams import Figure, Job, Runner, arguments_of, finish, made_by, main_or_worker, table, weights_of

GOALS = {"light": 1.01, "full": 1.05}
WORKLOADS = ("streamed", "resident", "training")
MOST_CONFIDENCE = 0.95
BOOTSTRAP = 2000
FAST = 0.25
"""The quantile that stands for fast steps."""
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
    steps: list[dict[str, list[float]]]
    """Seconds of each step by pair: `plain`, `looked` at whole by the recorder, and `passed` by."""
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

    @property
    def fast(self) -> float:
        """Recorded over plain, of fast steps."""
        return fast_ratio(self.steps)

    @property
    def fast_interval(self) -> tuple[float, float]:
        """95 % interval of that, by the bootstrap over pairs."""
        draw = random.Random(0)
        found = sorted(fast_ratio(draw.choices(self.steps, k=len(self.steps))) for _ in range(BOOTSTRAP))
        out = round((1 - MOST_CONFIDENCE) / 2 * BOOTSTRAP)
        return found[out], found[-1 - out]


def fast_ratio(pairs: Sequence[Mapping[str, Sequence[float]]]) -> float:
    """Lower quartiles of both kinds of recorded steps, weighed by how many there are, over that of plain steps."""
    steps = {kind: [s for pair in pairs for s in pair[kind]] for kind in ("plain", "looked", "passed")}
    recorded = [(len(steps[kind]), fast_of(steps[kind])) for kind in ("looked", "passed") if steps[kind]]
    mean = sum(count * seconds for count, seconds in recorded) / sum(count for count, _ in recorded)
    return mean / fast_of(steps["plain"])


def fast_of(seconds: Sequence[float]) -> float:
    """The lower quartile."""
    return sorted(seconds)[int(FAST * len(seconds))]


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

    def timed(context: AbstractContextManager[Any]) -> list[tuple[float, bool]]:
        """Seconds of each step, and whether more than twice as much was recorded in it as in the least of them."""
        with context as profiler:
            for _ in range(UNUSUAL):
                step()
            seconds = []
            for _ in range(job["steps"]):
                hooks = profiler._recorder.hooks if profiler is not None else 0  # nothing public tells: nobody needs it
                start = time.perf_counter()
                step()
                seconds.append((time.perf_counter() - start, profiler._recorder.hooks - hooks if profiler else 0))
            least = min(hooks for _, hooks in seconds)
            return [(each, hooks > 2 * least) for each, hooks in seconds]

    ratios, steps = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(job["pairs"]):
            profiler = penstock.Profiler(Path(folder) / f"{number}.prof", level=job["level"])
            found = {}
            for recorded in (number % 2 == 0, number % 2 == 1):
                found[recorded] = timed(profiler if recorded else nullcontext())
            recorded, plain = found[True], [seconds for seconds, _ in found[False]]
            ratios.append(sum(seconds for seconds, _ in recorded) / sum(plain))
            kinds = {
                kind: [s for s, looked in recorded if looked == (kind == "looked")] for kind in ("looked", "passed")
            }
            steps.append({"plain": plain, **kinds})
        summary, nbytes = profiler.summary(), profiler.path.stat().st_size
    return {
        "plain_s": statistics.median(seconds for pair in steps for seconds in pair["plain"]),
        "ratios": ratios,
        "steps": steps,
        "records": summary.recorded // (job["steps"] + UNUSUAL),
        "nbytes": nbytes // (job["steps"] + UNUSUAL),
        "own": summary.overhead or 0.0,
    }


def shown_interval(interval: tuple[float, float]) -> str:
    """Both ends, as percents above 1."""
    return f"{interval[0] - 1:+.2%} … {interval[1] - 1:+.2%}"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--levels", default="light,full", help="comma-separated (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=15, help="at least 10 (default: %(default)s)")
    parser.add_argument("--shape", choices=("reference", "tiny"), default="reference", help="of the streamed model")


STEPS = {"streamed": 3, "resident": 30, "training": 12}
"""Per half of a pair: two to eight seconds, and several turns of what is looked at in some steps only."""


COLUMNS = (
    "workload, level", "plain\nms/step", "fast steps\nslower by", "95 % interval", "all steps", "95 % interval",
    "pairs", "records\n/step", "KiB\n/step", "own CPU",
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
            f"{row.fast - 1:+.2%}",
            shown_interval(row.fast_interval),
            f"{row.median - 1:+.2%}",
            shown_interval(row.interval),
            str(len(row.ratios)),
            str(row.records),
            f"{row.nbytes / 1024:.1f}",
            f"{row.own:.2%}",
        ]
        for row in rows
    ]
    figures = [
        Figure(name=f"{r.workload}, {r.level}: fast steps, recorded / plain", value=r.fast, goal=GOALS[r.level])
        for r in rows
    ]
    finish(arguments, table("the profiler's cost", COLUMNS, shown), figures, [asdict(row) for row in rows])


if __name__ == "__main__":
    main_or_worker(main, worker)
