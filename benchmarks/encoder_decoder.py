"""Decode with an encoder and a decoder, or with a draft model, in less memory than half the weights.

    python -m benchmarks.encoder_decoder                              # T5, BART, Whisper, assisted generation
    python -m benchmarks.encoder_decoder --models t5 --budgets 1/2,7/8 --json result.json
    python -m benchmarks.encoder_decoder --size tiny --new-tokens 6   # tries the harness out

Each model runs resident (the yardstick) and streamed under each budget, each time in a process of its own. Assisted
generation streams the target and keeps the draft resident, both under penstock in one process.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

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
from .sweeps import LEARNING, SweepClock, used_nbytes

MODELS = ("t5", "bart", "whisper", "assisted")
AUTO_CLASSES = {
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
    "whisper": "AutoModelForSpeechSeq2Seq",
    "assisted": "AutoModelForCausalLM",
}
PROMPT_LENGTH = 32
DISTANCE_GOAL = 1.15
ON_TIME_GOAL = 0.95


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model under one budget."""

    model: str
    weights_nbytes: int
    budget_nbytes: int
    used_nbytes: int
    """Weights that one sweep of the decoder uses."""
    t_compute_s: float
    """Seconds per sweep of the resident model, median."""
    disk: DiskAround
    tokens_equal: bool
    report: dict[str, Any]

    @property
    def t_disk_s(self) -> float:
        """The bytes read per sweep at the raw rate of the disk."""
        return float(self.report["read_nbytes_per_sweep"]) / self.disk.nbytes_per_s

    @property
    def distance(self) -> float:
        """Over the larger of disk and compute, for the bytes that this plan reads."""
        return float(self.report["s_per_sweep"]) / max(self.t_disk_s, self.t_compute_s)

    @property
    def machine_distance(self) -> float:
        """The same for the fewest bytes that any plan could read: the decoder's weights, less the budget."""
        least = max(0, self.used_nbytes - self.budget_nbytes) / self.disk.nbytes_per_s
        return float(self.report["s_per_sweep"]) / max(least, self.t_compute_s)

    @property
    def disk_binds(self) -> bool:
        """Whether reading takes longer than computing: then blocks cannot all be there before they are wanted."""
        return self.t_disk_s > self.t_compute_s

    @property
    def on_time(self) -> float:
        """Share of all acquires that found their block ready."""
        return float(self.report["on_time"] / max(self.report["acquires"], 1))

    @property
    def streamed_on_time(self) -> float | None:
        """The same of streamed blocks only; None where nothing was read."""
        streamed = self.report["streamed"]
        return None if not streamed else max(0.0, 1 - self.report["waits"] / streamed)

    def cells(self) -> list[str]:
        """The row of the table."""
        streamed = self.streamed_on_time
        return [
            f"{self.model}, {self.budget_nbytes / self.weights_nbytes:.0%}",
            f"{self.weights_nbytes / GIB:.2f}",
            f"{self.budget_nbytes / GIB:.2f}",
            f"{self.report['read_nbytes_per_sweep'] / GIB:.3f}",
            f"{self.disk.nbytes_per_s / GIB:.2f}" + ("" if self.disk.steady else "~"),
            f"{self.report['s_per_sweep']:.3f}",
            f"{self.t_disk_s:.3f}",
            f"{self.t_compute_s:.3f}",
            "disk" if self.disk_binds else "compute",
            f"{self.distance:.2f}",
            f"{self.machine_distance:.2f}",
            f"{self.on_time:.1%}",
            "-" if streamed is None else f"{streamed:.1%}",
            "yes" if self.tokens_equal else "no",
        ]

    def figures(self) -> list[Figure]:
        """What the goals are held against. Blocks can only be on time where the disk does not bind."""
        name = f"{self.model} with {self.budget_nbytes / GIB:.2f} GiB"
        found = [Figure(name=f"{name}, distance", value=self.distance, goal=DISTANCE_GOAL)]
        streamed = self.streamed_on_time
        if streamed is not None:
            binds = " (the disk binds: some must wait)" if self.disk_binds else ""
            found.append(
                Figure(name=f"{name}, streamed blocks on time{binds}", value=streamed, goal=ON_TIME_GOAL, at_least=True)
            )
        return found


COLUMNS = (
    "model, budget", "weights\nGiB", "budget\nGiB", "GiB read\n/sweep", "disk\nGiB/s", "s/sweep", "disk\ns/sweep",
    "compute\ns/sweep", "binds", "distance", "distance\n(machine)", "on time\n(all)", "on time\n(streamed)",
    "tokens\nequal",
)  # fmt: skip


def worker(job: Job) -> dict[str, Any]:
    """Run one contender and report. `job`: model, checkpoint, draft, budget_nbytes (None: resident), new_tokens."""
    import torch
    import transformers

    import penstock

    def load(path: str, budget_nbytes: int) -> Any:
        if job["budget_nbytes"] is None:
            return getattr(transformers, AUTO_CLASSES[job["model"]]).from_pretrained(path, dtype="auto")
        return penstock.load(path, max_memory={"host": budget_nbytes}, device="cpu")

    started_s = time.perf_counter()
    model = load(job["checkpoint"], job["budget_nbytes"])
    draft = load(job["draft"], 2 * GIB) if job["draft"] else None
    inputs = _inputs(job, model.config, torch)
    options = {"max_new_tokens": job["new_tokens"], "do_sample": False}
    if draft is not None:
        options["assistant_model"] = draft
    clock = SweepClock(model)
    tokens = model.generate(**inputs, **options)
    clock.end()
    found = {"tokens": tokens.tolist(), "total_s": time.perf_counter() - started_s, **clock.report()}
    if job["budget_nbytes"] is None:
        short = {**options, "max_new_tokens": 4}
        found["used_nbytes"] = used_nbytes(model, lambda: model.generate(**inputs, **short))
    else:
        found["draft_resident"] = draft.penstock.plan.resident if draft is not None else None
        for streamed in filter(None, (model, draft)):
            penstock.close(streamed)
    return found


def _inputs(job: Job, config: Any, torch: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    if job["model"] == "whisper":
        frames = 2 * config.max_source_positions
        sound = torch.randn(1, config.num_mel_bins, frames, generator=generator)
        return {"input_features": sound.to(torch.bfloat16)}
    ids = torch.randint(3, config.vocab_size, (1, PROMPT_LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def measure(name: str, arguments: argparse.Namespace) -> list[Row]:
    """One model under every budget.

    Raises ContenderFailedError when a worker fails.
    """
    runner = Runner("benchmarks.encoder_decoder", timeout_s=arguments.timeout)

    def made(checkpoint: str) -> Path:
        return made_by("benchmarks.stream_checkpoints", checkpoint, "--size", arguments.size, folder=arguments.dir)

    checkpoint = made("target" if name == "assisted" else name)
    files, weights_nbytes = weights_of(checkpoint)
    job = {
        "model": name,
        "checkpoint": str(checkpoint),
        "draft": str(made("draft")) if name == "assisted" else None,
        "budget_nbytes": None,
        "new_tokens": arguments.new_tokens,
    }
    resident = runner.run(job)
    rows = []
    for share in arguments.budgets:
        budget = int(weights_nbytes * share)
        label = f"{name} with {budget / GIB:.2f} of {weights_nbytes / GIB:.2f} GiB"
        report, disk = runner.run_steady({**job, "budget_nbytes": budget}, files, label)
        rows.append(
            Row(
                model=name,
                weights_nbytes=weights_nbytes,
                budget_nbytes=budget,
                used_nbytes=resident["used_nbytes"],
                t_compute_s=resident["s_per_sweep_median"],
                disk=disk,
                tokens_equal=report["tokens"] == resident["tokens"],
                report=report,
            )
        )
    return rows


def _options(parser: argparse.ArgumentParser) -> None:
    def shares(text: str) -> list[Fraction]:
        return [Fraction(part) for part in text.split(",")]

    def models(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in MODELS]:
            raise argparse.ArgumentTypeError(f"unknown models {unknown}; there are {list(MODELS)}")
        return names

    parser.add_argument("--models", type=models, default=list(MODELS), help=f"comma-separated: {','.join(MODELS)}")
    parser.add_argument(
        "--budgets",
        type=shares,
        default=[Fraction(1, 2), Fraction(7, 8)],
        help="host budgets as shares of the weights (default: 1/2,7/8; under the second the disk seldom binds)",
    )
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny tries the harness out")
    parser.add_argument("--new-tokens", type=int, default=16, help=f"more than {LEARNING + 1} (default: %(default)s)")


def main() -> None:
    """Command line."""
    arguments = arguments_of("encoder_decoder", __doc__, _options)
    if arguments.new_tokens <= LEARNING + 1:
        raise OSError(f"--new-tokens must be more than {LEARNING + 1}: the first {LEARNING} sweeps are not counted")
    rows = [row for name in arguments.models for row in measure(name, arguments)]
    title = f"decoding, {arguments.new_tokens} new tokens, the first {LEARNING} sweeps left out"
    shown = table(title, COLUMNS, [row.cells() for row in rows])
    finish(arguments, shown, [figure for row in rows for figure in row.figures()], [asdict(row) for row in rows])


if __name__ == "__main__":
    main_or_worker(main, worker)
