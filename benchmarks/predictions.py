"""What `penstock plan` predicts against what a run takes: many runs, each predicted from its config before it runs.

    python -m benchmarks.predictions
    python -m benchmarks.predictions --only emulated --json predictions.json --plot docs/predictions.svg

Each run has a process of its own. In it the machine is calibrated (quick: 5 s), the answer is predicted from the
config alone, then the model is loaded with the same budgets, batch and length, plans by the same calibration, and
answers four times, and the machine is calibrated again. Of the last three answers the median and the best are told.
What processors do is calibrated as the best of several repetitions, since other tenants of a shared machine are no
property of it, so the best answer is what the prediction is held against. The disk drifts: where the two calibrations'
read rates differ by more than 15 %, the run is repeated, and the prediction takes the mean of both. Nothing is fitted
to the runs.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .streams import Figure, Job, Runner, arguments_of, finish, made_by, main_or_worker, table

MEDIAN_GOAL, WORST_GOAL = 0.08, 0.20
STEADY = 0.15
REPEATS = 2
ANSWERS = 4
"""The first brings what stays, and is not measured."""
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    checkpoint: str
    device: str
    budget: str
    """As `--max-memory` has it."""
    batch: int
    prompt: int
    new_tokens: int

    @property
    def name(self) -> str:
        """For the table."""
        device = self.device.partition(":")[0]
        return f"{self.checkpoint}, {device}, {self.budget}, batch {self.batch}, prompt {self.prompt}"


EMULATED = "emulated:h2d=2GiB/s,d2h=2GiB/s"


def cases(only: str | None) -> Iterator[Case]:
    """What is run."""
    if only in (None, "cpu"):
        for budget in ("host=2GiB", "host=3500MiB", "host=8GiB"):
            for batch, prompt in ((1, 32), (4, 16), (1, 64), (8, 8)):
                yield _case("reference", "cpu", budget, batch, prompt)
    if only in (None, "emulated"):
        for budget in ("device=2GiB,host=2GiB", "device=2GiB,host=6GiB", "device=4GiB,host=6GiB"):
            for batch, prompt in ((1, 32), (4, 16)):
                yield _case("reference", EMULATED, budget, batch, prompt)
    if only in (None, "small"):
        for budget in ("host=64MiB", "host=120MiB", "host=1GiB"):
            for batch, prompt in ((1, 32), (8, 64)):
                yield _case("small", "cpu", budget, batch, prompt)


def _case(checkpoint: str, device: str, budget: str, batch: int, prompt: int) -> Case:
    tokens = 5 if checkpoint == "reference" else 24
    return Case(checkpoint=checkpoint, device=device, budget=budget, batch=batch, prompt=prompt, new_tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run, predicted and measured, in seconds."""

    case: Case
    prompt_s: float
    token_s: float
    predicted_prompt_s: float
    predicted_token_s: float
    binds: str
    median_s: float
    """Of the answers; all other measured figures are of the best one."""
    read_rate: float
    repeats: int

    @property
    def answer_s(self) -> float:
        """Prompt and tokens, measured."""
        return self.prompt_s + (self.case.new_tokens - 1) * self.token_s

    @property
    def predicted_s(self) -> float:
        """The same, predicted."""
        return self.predicted_prompt_s + (self.case.new_tokens - 1) * self.predicted_token_s

    @property
    def error(self) -> float:
        """Of the whole answer: predicted / measured - 1."""
        return self.predicted_s / self.answer_s - 1


def worker(job: Job) -> dict[str, Any]:
    """Calibrate, predict, run, calibrate."""
    import time

    import torch

    import penstock
    from penstock.budget import parse_budget
    from penstock.caches import calibration_cache
    from penstock.devices import open_device
    from penstock.runtime.calibration.calibrate import calibrate
    from penstock.runtime.foresight import Foresight, Room

    def calibrated() -> Any:
        device = open_device(job["device"])
        try:
            calibration = calibrate(device, quick=True)
            calibration_cache().write(calibration, device)  # what load decides by is what the prediction knows
            return calibration.hardware
        finally:
            device.close()

    before = calibrated()
    budget = parse_budget(job["budget"])
    foresight = Foresight(job["path"])
    model = penstock.load(
        job["path"],
        device=job["device"],
        max_memory=job["budget"],
        context=job["prompt"] + job["new_tokens"],
        batch=job["batch"],
    )
    ids = torch.randint(300, 1000, (job["batch"], job["prompt"]), generator=torch.Generator().manual_seed(0))
    answers: list[list[float]] = []
    with torch.no_grad():
        for _ in range(ANSWERS):
            cache, given, seconds = None, ids, []
            for _ in range(job["new_tokens"]):
                start = time.perf_counter()
                output = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, given = output.past_key_values, output.logits[:, -1:].argmax(-1)
                seconds.append(time.perf_counter() - start)
            answers.append(seconds)
    penstock.close(model)
    del model, cache, output
    after = calibrated()
    predictions = [
        foresight.forecast(
            hardware,
            prompt=job["prompt"],
            generated=job["new_tokens"],
            batch=job["batch"],
            room=Room(host=budget.host, device=budget.device),
            warm=True,
        )
        for hardware in (before, after)
    ]
    best = min(answers[1:], key=sum)
    return {
        "prompt_s": best[0],
        "token_s": statistics.mean(best[1:]),
        "median_s": statistics.median(sum(seconds) for seconds in answers[1:]),
        "predicted_prompt_s": statistics.mean(found.prediction.turns[0].seconds for found in predictions),
        "predicted_token_s": statistics.mean(found.token_s for found in predictions),
        "binds": predictions[0].binds,
        "read_rates": [before.disk_read, after.disk_read],
    }


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """All cases."""
    runner = Runner("benchmarks.predictions", timeout_s=arguments.timeout)
    folders = {
        "reference": made_by(
            "benchmarks.reference_checkpoint", "--shape", "reference", "--no-gguf", folder=arguments.dir
        ),
        "small": made_by("benchmarks.stream_checkpoints", "small", folder=arguments.dir),
    }
    for case in cases(arguments.only):
        if arguments.match not in case.name:
            continue
        repeats, steady = 0, False
        while not steady and repeats < REPEATS:
            found = runner.run({**asdict(case), "path": str(folders[case.checkpoint])})
            rates = found.pop("read_rates")
            repeats += 1
            steady = case.budget in ("host=8GiB", "host=1GiB") or abs(rates[0] - rates[1]) <= STEADY * max(rates)
        row = Row(case=case, read_rate=statistics.mean(rates), repeats=repeats, **found)
        print(f"{row.case.name}: {row.predicted_s:.2f} / {row.answer_s:.2f} s, {row.error:+.1%}", flush=True)
        yield row


def scatter(rows: Sequence[Row]) -> str:
    """Predicted over measured seconds, on logarithmic axes, as SVG."""
    from math import log10

    low = min(min(row.answer_s, row.predicted_s) for row in rows) / 1.5
    high = max(max(row.answer_s, row.predicted_s) for row in rows) * 1.5
    side, margin = 420, 60

    def at(value: float) -> float:
        return margin + (log10(value) - log10(low)) / (log10(high) - log10(low)) * (side - margin - 20)

    colours = {"cpu": "#2563eb", "emulated": "#d97706"}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" font-family="sans-serif" font-size="11">',
        f'<rect width="{side}" height="{side}" fill="#ffffff"/>',
    ]
    for share, dash in ((1.0, ""), (1.2, "3"), (1 / 1.2, "3")):
        first, last = (max(low, low / share), min(high, high / share))
        parts.append(
            f'<line x1="{at(first):.1f}" y1="{side - at(first * share):.1f}" x2="{at(last):.1f}" '
            f'y2="{side - at(last * share):.1f}" stroke="#888" stroke-dasharray="{dash}"/>'
        )
    for row in rows:
        colour = colours[row.case.device.partition(":")[0]]
        parts.append(
            f'<circle cx="{at(row.answer_s):.1f}" cy="{side - at(row.predicted_s):.1f}" r="4" fill="{colour}" '
            f'fill-opacity=".75"><title>{row.case.name}: {row.error:+.1%}</title></circle>'
        )
    for value in (0.1, 0.3, 1, 3, 10, 30):
        if low < value < high:
            parts.append(f'<text x="{at(value):.1f}" y="{side - 35}" text-anchor="middle">{value:g}</text>')
            parts.append(f'<text x="45" y="{side - at(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<text x="{side / 2}" y="{side - 12}" text-anchor="middle">measured, s per answer</text>')
    middle = side / 2
    parts.append(f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">predicted</text>')
    parts.append('<text x="70" y="28" fill="#2563eb">● cpu</text><text x="120" y="28" fill="#d97706">● emulated</text>')
    return "".join([*parts, "</svg>\n"])


COLUMNS = (
    "run",
    "measured\nprompt",
    "s/token",
    "predicted\nprompt",
    "s/token",
    "error of\nthe answer",
    "median/\nbest",
    "bound by",
    "runs",
)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=("cpu", "emulated", "small"))
    parser.add_argument("--match", default="", metavar="TEXT", help="only runs whose name holds this")
    parser.add_argument("--plot", type=Path, help="write the scatter plot as SVG")


def main() -> None:
    """Command line."""
    arguments = arguments_of("predictions", __doc__, _options)
    rows = list(measure(arguments))
    shown = [
        [
            row.case.name,
            f"{row.prompt_s:.3f}",
            f"{row.token_s:.3f}",
            f"{row.predicted_prompt_s:.3f}",
            f"{row.predicted_token_s:.3f}",
            f"{row.error:+.1%}",
            f"{row.median_s / row.answer_s:.2f}",
            row.binds,
            str(row.repeats),
        ]
        for row in rows
    ]
    errors = sorted(abs(row.error) for row in rows)
    figures = [
        Figure(name="median error", value=statistics.median(errors), goal=MEDIAN_GOAL),
        Figure(name="worst error", value=errors[-1], goal=WORST_GOAL),
    ]
    if arguments.plot:
        arguments.plot.write_text(scatter(rows))
    finish(arguments, table("predicted and measured", COLUMNS, shown), figures, [asdict(row) for row in rows])


if __name__ == "__main__":
    main_or_worker(main, worker)
