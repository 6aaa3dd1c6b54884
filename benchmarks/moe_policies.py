"""Cache policies for experts over kinds of routing, capacities and machines: which to take where nothing is known.

    python -m benchmarks.moe_policies
    python -m benchmarks.moe_policies --layers 8 --json result.json
    python -m benchmarks.moe_policies --capacities 0.25 --into docs/moe.md

Routing is generated (18 recipes, each with `--seeds` seeds), seconds are simulated with machines' data sheets. A
contender is a policy, a rule of admission and a minimum per layer. Its figure at a place (recipe, capacity, machine) is
how much longer than the best contender there it takes per generated token; defaults are chosen by the mean of that.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import msgspec
import numpy as np

from penstock.hardware import load
from penstock.scheduler.cost import CostModel
from penstock.scheduler.experts.cache import ADMISSIONS
from penstock.scheduler.experts.contest import Contender, compete, recipes_around
from penstock.scheduler.experts.costs import expert_costs
from penstock.scheduler.experts.events import events_of
from penstock.scheduler.experts.generate import generate_trace
from penstock.scheduler.experts.layerscheduler import LayerScheduler
from penstock.scheduler.experts.policies import POLICIES
from penstock.scheduler.experts.recipe import Recipe
from penstock.scheduler.experts.shape import ExpertShape, Routing

CAPACITIES = (0.125, 0.25, 0.5)
MINIMUMS = (0.0, 0.5, 1.0)
MACHINES = (("rtx4090-1ssd", 1.0), ("rtx4090-1ssd", 0.6), ("cpu-only", 1.0))
"""With what the host holds of all experts: all in host memory; partly on disk; no device, the rest on disk."""
EXPERT = ExpertShape(hidden=1024, ffn=704)
BEGIN, END = "<!-- policies: begin -->", "<!-- policies: end -->"


@dataclass(frozen=True, kw_only=True)
class Place:
    """One recipe with a capacity on a machine, and what the contenders make of it."""

    recipe: Recipe
    capacity: float
    machine: str
    seconds: dict[Contender, float]
    hits: dict[Contender, float]

    def behind(self, contender: Contender) -> float:
        """How much longer than the best a contender takes."""
        return self.seconds[contender] / min(self.seconds.values()) - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep and print, or insert, its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (default: 4)")
    parser.add_argument("--requests", type=int, default=2, help="sequences of 64 + 96 tokens (default: 2)")
    parser.add_argument(
        "--capacities", type=float, nargs="+", default=CAPACITIES, metavar="SHARE", help="of all experts"
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds per recipe (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every place as JSON")
    parser.add_argument("--into", type=Path, metavar="FILE", help="put the table between the marks of a Markdown file")
    arguments = parser.parse_args(argv)
    routing = Routing(layers=arguments.layers, experts=64, top_k=4)
    base = Recipe(routing=routing, expert=EXPERT, requests=arguments.requests, prompt=64, generate=96)
    places = sweep(base, arguments.seeds, arguments.capacities, arguments.jobs)
    text = markdown(places)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([as_json(place) for place in places], indent=1) + "\n", encoding="utf-8")
    if arguments.into is not None:
        insert(arguments.into, text)
    return 0


def contenders() -> list[Contender]:
    """Each policy with each rule of admission, and with each minimum. To LRU what was just used is always worth most:
    better and always are the same."""
    rules = [Contender(policy=name, admission=rule, minimum=1.0) for name in POLICIES for rule in ADMISSIONS]
    pools = [Contender(policy=name, minimum=minimum) for name in POLICIES for minimum in MINIMUMS]
    return [each for each in dict.fromkeys((*rules, *pools)) if (each.policy, each.admission) != ("lru", "better")]


def sweep(base: Recipe, seeds: int, capacities: Sequence[float], jobs: int) -> list[Place]:
    """Every place."""
    recipes = [msgspec.structs.replace(each, seed=seed) for each in recipes_around(base) for seed in range(seeds)]
    found: list[Place] = []
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        for number, places in enumerate(pool.map(places_of, recipes, repeat(capacities)), start=1):
            print(f"recipe {number} of {len(recipes)}", end="\r", file=sys.stderr, flush=True)
            found += places
    return found


def places_of(recipe: Recipe, capacities: Sequence[float]) -> list[Place]:
    """Those of one recipe."""
    events, total = events_of(generate_trace(recipe)), recipe.routing.total
    found = []
    for machine, host in MACHINES:
        scheduler = LayerScheduler(expert_costs(CostModel(hardware=load(machine)), EXPERT))
        for capacity in capacities:
            results = dict(
                compete(
                    recipe.routing,
                    events,
                    contenders(),
                    round(capacity * total),
                    scheduler=scheduler,
                    host=round(host * total),
                )
            )
            found.append(
                Place(
                    recipe=recipe,
                    capacity=capacity,
                    machine=f"{machine}, host {host:.0%}",
                    seconds={contender: result.decode.seconds_per_token for contender, result in results.items()},
                    hits={contender: result.decode.hit_rate for contender, result in results.items()},
                )
            )
    return found


def markdown(places: Sequence[Place]) -> str:
    """Contenders by how far they are behind the best on average, the nearest first."""
    machines = list(dict.fromkeys(place.machine for place in places))
    heading = ["policy", "admits", "minimum", "behind the best", "worst place", *machines, "hits"]
    rows = []
    for each in contenders():
        behind = np.array([place.behind(each) for place in places])
        by_machine = [np.mean([p.behind(each) for p in places if p.machine == machine]) for machine in machines]
        hits = np.mean([place.hits[each] for place in places])
        rows.append((float(behind.mean()), each, float(behind.max()), by_machine, float(hits)))
    rows.sort(key=lambda row: row[0])
    lines = [f"| {' | '.join(heading)} |", f"| {' | '.join('---' for _ in heading)} |"]
    for mean, each, worst, by_machine, hits in rows:
        cells = [
            each.policy,
            each.admission,
            f"{each.minimum:g}",
            f"{mean:.1%}",
            f"{worst:.0%}",
            *(f"{share:.1%}" for share in by_machine),
            f"{hits:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def as_json(place: Place) -> dict[str, object]:
    """A place with all its figures."""
    return {
        "recipe": msgspec.to_builtins(place.recipe),
        "capacity": place.capacity,
        "machine": place.machine,
        "seconds_per_token": {contender.name: seconds for contender, seconds in place.seconds.items()},
        "hit_rate": {contender.name: hits for contender, hits in place.hits.items()},
    }


def insert(file: Path, text: str) -> None:
    """Put a text between the marks."""
    before, found, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise SystemExit(f"{file} lacks the lines {BEGIN} and {END}")
    file.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
