"""Other systems' schedules, simulated, against what was published of them.

    python -m benchmarks.published --rows rows.json
    python -m benchmarks.published --rows rows.json --into docs/planner.md --json result.json

Each row of kind `validation` is predicted from its machine, model and workload, by its own system's policy; rows of
other kinds are not looked at. A figure that is printed with few digits counts as met where the prediction rounds to it.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from penstock.scheduler.systems import system

from .published_rows import BY_CONSTRUCTION, REASONS, figure_of, machine_of, model_of, work_of

GOAL = 0.20
LEAST = 60
BEGIN, END = "<!-- published: begin -->", "<!-- published: end -->"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row."""

    id: str
    system: str
    policy: str
    model: str
    machine: str
    workload: str
    metric: str
    unit: str
    published: float
    predicted: float
    error: float
    """Of the prediction, as a share of what was published; 0 where both are printed alike."""
    rounded: bool
    """The error is 0 for that reason, and would else be above the goal."""
    binds: str


def compare(row: Mapping[str, Any]) -> Comparison:
    """Predict one row."""
    name, work = work_of(row)
    machine = machine_of(row)
    prediction = system(name).predict(machine, model_of(row), work)
    predicted, published = figure_of(row, prediction), float(row["value"])
    error = predicted / published - 1
    alike = printed(predicted, row["value"]) == published
    return Comparison(
        id=str(row["id"]),
        system=str(row["system"]),
        policy=name,
        model=str(row["model"]["name"]),
        machine=machine_label(row),
        workload=workload_label(row, work.batch),
        metric="decode" if str(row["metric"]).startswith("decoding") else "all",
        unit=str(row["unit"]),
        published=published,
        predicted=predicted,
        error=0.0 if alike else error,
        rounded=alike and abs(error) > GOAL,
        binds=prediction.binds,
    )


def printed(figure: float, like: float | int) -> float:
    """A figure with as many decimals as another has."""
    decimals = len(str(like).partition(".")[2]) if isinstance(like, float) else 0
    return round(figure, decimals)


def machine_label(row: Mapping[str, Any]) -> str:
    """A machine in a few words."""
    said = row["hardware"]
    drives = f", {said['ssd_count']} SSD" if "ssd_count" in said else ""
    drives = f", {said['ssd']}" if str(said.get("ssd", "")).startswith(("4 x", "8 x")) else drives
    return f"{said.get('gpus', 1)} × {str(said['gpu']).split(' (')[0].removeprefix('NVIDIA ')}{drives}"


def workload_label(row: Mapping[str, Any], batch: int) -> str:
    """A workload in a few words."""
    said = row["workload"]
    if "seq" in said:
        return f"batch {batch}, {said['seq']} tokens"
    tier = said.get("tier") or said.get("lowest_tier") or ""
    prefetch = "" if said.get("prefetch", True) else ", no prefetch"
    sequences = f", batch {batch}" if batch > 1 else ""
    return f"{said.get('prompt', '?')} + {said.get('gen', '?')}{sequences}{', ' + tier if tier else ''}{prefetch}"


def by_system(found: Sequence[Comparison]) -> list[tuple[str, int, float, float, int]]:
    """Of each system: its name, rows, median and largest error, and how many are within the goal."""
    names = dict.fromkeys(each.system for each in found)
    table = []
    for name in names:
        errors = [abs(each.error) for each in found if each.system == name]
        table.append((name, len(errors), median(errors), max(errors), sum(error <= GOAL for error in errors)))
    return table


def markdown(found: Sequence[Comparison]) -> str:
    """Tables for the documentation."""
    errors = [abs(each.error) for each in found]
    missed = [each for each in found if abs(each.error) > GOAL]
    rounded = sum(each.rounded for each in found)
    known = [each for each in found if each.id in BY_CONSTRUCTION]
    others = median(abs(each.error) for each in found if each not in known)
    lines = [
        f"{len(found)} rows: median error {median(errors):.1%}, {len(found) - len(missed)} within {GOAL:.0%}, worst "
        f"{max(errors):.0%}. {rounded} of those within are met only because both are printed with one digit.",
        f"Without the {len(known)} rows that calibration figures were worked out from the median is {others:.1%}.",
        "",
        f"| system | rows | median error | worst | within {GOAL:.0%} |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {name} | {count} | {mid:.1%} | {worst:.0%} | {within} |"
            for name, count, mid, worst, within in by_system(found)
        ),
        "",
        f"Rows that miss {GOAL:.0%}, and why:",
        "",
        *(
            f"* {each.id} ({each.system}, {each.model}, {each.error:+.0%}): {REASONS.get(each.id, 'not looked into')}."
            for each in missed
        ),
        "",
        "| row | system | model | machine | workload | published | predicted | error | binds |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for each in found:
        unit = "" if each.unit == "tokens/s" else f" {each.unit}"
        unit += " (decode)" if each.metric == "decode" else ""
        error = f"{each.error:+.0%}" + (" (rounded)" if each.rounded else "")
        figures = f"{each.published:g}{unit} | {each.predicted:.3g} | {error} | {each.binds}"
        lines.append(f"| {each.id} | {each.system} | {each.model} | {each.machine} | {each.workload} | {figures} |")
    return "\n".join(lines)


def main() -> int:
    """Compare, print, and write what was asked for; 4 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="JSON list of published rows")
    parser.add_argument("--into", type=Path, help="Markdown file, between whose marks the tables are written")
    parser.add_argument("--json", type=Path, help="write all comparisons here")
    asked = parser.parse_args()
    rows = [row for row in json.loads(asked.rows.read_text()) if row["kind"] == "validation"]
    found = [compare(row) for row in rows]
    for each in found:
        print(
            f"{each.id:15} {each.system[:28]:28} {each.model:11} {each.published:8g} {each.predicted:9.3f} "
            f"{each.error:+7.1%}  {each.binds}"
        )
    print()
    for name, count, mid, worst, within in by_system(found):
        print(f"{name:36} {count:3} rows  median {mid:6.1%}  worst {worst:6.1%}  within {GOAL:.0%}: {within}")
    errors = [abs(each.error) for each in found]
    middle = median(errors)
    within = sum(error <= GOAL for error in errors)
    print(
        f"{'all':36} {len(found):3} rows  median {middle:6.1%}  worst {max(errors):6.1%}  within {GOAL:.0%}: {within}"
    )
    if asked.json is not None:
        asked.json.write_text(json.dumps([asdict(each) for each in found], indent=2) + "\n")
    if asked.into is not None:
        before, mark, rest = asked.into.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not mark or not end:
            parser.error(f"{asked.into} lacks the lines {BEGIN} and {END}")
        asked.into.write_text(f"{before}{BEGIN}\n{markdown(found)}\n{END}{after}")
    return 0 if len(found) >= LEAST and middle <= GOAL else 4


if __name__ == "__main__":
    raise SystemExit(main())
