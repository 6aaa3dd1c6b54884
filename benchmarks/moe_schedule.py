"""How far the schedule of a mixture-of-experts layer is from the best one, and how long finding it takes.

    python -m benchmarks.moe_schedule
    python -m benchmarks.moe_schedule --layers 200 --json result.json

Layers are random (benchmarks/moe_layers.py), of up to 12 experts, and their times simulated: a figure of the
algorithm, not of a machine. The best schedule is found by brute force over assignments and orders of reading. The third
column is HybriMoE's schedule by itself, which the scheduler starts from.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from penstock.scheduler.experts.bruteforce import best_layer
from penstock.scheduler.experts.greedy import greedy_assignment
from penstock.scheduler.experts.layerscheduler import LayerScheduler, read_order
from penstock.scheduler.experts.timelines import Assignment, run_layer

from .moe_layers import random_layer

GOAL = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, print it, and return 4 where a layer is farther off than the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first layer (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    arguments = parser.parse_args(argv)
    rows = [compare(seed) for seed in range(arguments.seed, arguments.seed + arguments.layers)]
    print("layers    count  above the best: mean   worst  over 5 %  HybriMoE: mean   worst  planned in, median")
    figures = {}
    for kind in ("decode", "batch", "prefill", "all"):
        chosen = [row for row in rows if kind in (row["kind"], "all")]
        if not chosen:
            continue
        found, greedy = (np.array([row[name] for row in chosen]) for name in ("found", "greedy"))
        plan_ms = float(np.median([row["plan_s"] for row in chosen])) * 1e3
        over = int((found > GOAL).sum())
        print(
            f"{kind:8} {len(chosen):6}  {found.mean():20.2%} {found.max():7.2%} {over:9}  {greedy.mean():14.2%} "
            f"{greedy.max():7.2%} {plan_ms:16.2f} ms"
        )
        figures[kind] = {
            "layers": len(chosen), "mean": float(found.mean()), "worst": float(found.max()), "over_goal": over,
            "hybrimoe_mean": float(greedy.mean()), "hybrimoe_worst": float(greedy.max()), "plan_ms": plan_ms,
        }  # fmt: skip
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 4 if any(row["found"] > GOAL for row in rows) else 0


def compare(seed: int) -> dict[str, float | str]:
    """One layer: how far above the best its schedules are, as shares of the best."""
    layer = random_layer(seed)
    tasks, costs = layer.tasks, layer.costs
    best = best_layer(tasks, costs)[1].seconds
    scheduler = LayerScheduler(costs)
    begin = time.perf_counter()
    found = scheduler.plan(tasks).seconds
    plan_s = time.perf_counter() - begin
    on_cpu = greedy_assignment(tasks, costs)
    greedy = run_layer(tasks, costs, Assignment(on_cpu=on_cpu, reads=read_order(tasks, costs, on_cpu))).seconds
    return {"kind": layer.kind, "found": found / best - 1, "greedy": greedy / best - 1, "plan_s": plan_s}


if __name__ == "__main__":
    raise SystemExit(main())
