"""What leasing costs: microseconds per acquire and release of a ready block, and what a model that fits pays.

    python -m benchmarks.acquire
    python -m benchmarks.acquire --size tiny --count 100

A block is leased under a plain lock; only a block that is missing costs a trip through the executor's loop. Measured
with the executor running, over blocks that stay and over blocks of the ring, which the loop refills meanwhile. A model
that fits its budget has no hooks: its forward is compared with the plain model's in one process, calls in turn, so that
the machine's moods meet both.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .streams import Figure, Job, Runner, arguments_of, finish, made_by, main_or_worker

GOAL_US = 50.0
OVERHEAD_GOAL = 1.02
PARTS = ("leases", "overhead")
READY_TIMEOUT_S = 10.0


def worker(job: Job) -> dict[str, Any]:
    """One part of the benchmark. `job`: part, checkpoint, count."""
    return {"leases": _leases, "overhead": _overhead}[job["part"]](Path(job["checkpoint"]), job["count"])


def _leases(checkpoint: Path, count: int) -> dict[str, Any]:
    import penstock

    weights_nbytes = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    model = penstock.load(checkpoint, max_memory={"host": weights_nbytes // 2}, device="cpu")
    machinery = model.penstock._machinery  # the leases themselves have no public name: users see only forwards
    executor, front = machinery.executor, machinery.front
    order = machinery.layout.expected
    blocks = [block for path, _ in model.named_modules() for block in order.get(path, ())]
    found: dict[str, Any] = {kind: {"acquire_us": [], "release_us": []} for kind in ("resident", "ring")}

    def full() -> bool:
        return any(len(times["acquire_us"]) < count for times in found.values())

    while full():
        executor.begin(0)
        for block in blocks:
            kind = found["resident" if block in front.permanent else "ring"]
            _until_ready(front, block)
            start = time.perf_counter_ns()
            lease = executor.acquire(block)
            got = time.perf_counter_ns()
            executor.release(lease)
            done = time.perf_counter_ns()
            if lease.waited_ns == 0:
                kind["acquire_us"].append((got - start) / 1e3)
                kind["release_us"].append((done - got) / 1e3)
        executor.end(failed=False)
    penstock.close(model)
    return found


def _until_ready(tier: Any, block: int) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while True:
        held = tier.holding.get(block)
        if held is not None and held.ready:
            return
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"block {block} was not prefetched in {READY_TIMEOUT_S:.0f} s")
        time.sleep(1e-4)


def _overhead(checkpoint: Path, count: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    import penstock

    def plain() -> Any:
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")

    weights_nbytes = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    room = {"host": 2 * weights_nbytes + 2**28}
    contenders = {
        "plain": plain(),
        "plain again": plain(),
        "load": penstock.load(checkpoint, max_memory=room, device="cpu"),
        "offload": penstock.offload(plain(), max_memory=room, device="cpu"),
    }
    ids = torch.tensor([[7]])
    found: dict[str, Any] = {name: [] for name in contenders}
    with torch.inference_mode():
        expected = contenders["plain"](ids).logits
        for name, model in contenders.items():
            assert name.startswith("plain") or model.penstock.plan.resident, f"{name} does not fit"
            assert torch.equal(model(ids).logits, expected), f"{name} computes something else"
        names = list(contenders)
        for number in range(max(count // 10, 10)):
            for name in names[number % len(names) :] + names[: number % len(names)]:  # who follows whom must not matter
                model = contenders[name]
                found[name].append(_seconds(model, ids))
    return found


def _seconds(model: Any, ids: Any) -> float:
    start = time.perf_counter()
    model(ids)
    return time.perf_counter() - start


def figures_of(leases: dict[str, Any], overhead: dict[str, Any], count: int) -> list[Figure]:
    """Means of the first `count` leases, and ratios of median forwards."""

    def mean(values: Sequence[float]) -> float:
        return statistics.mean(values[:count])

    found = [
        Figure(name=f"{what} of a ready block, {kind}", value=mean(times[f"{what}_us"]), goal=GOAL_US, unit="µs")
        for kind, times in leases.items()
        for what in ("acquire", "release")
    ]
    plain_s = statistics.median(overhead["plain"])
    for name in ("plain again", "load", "offload"):  # the first tells how far two equal models differ on this machine
        ratio = statistics.median(overhead[name]) / plain_s
        found.append(Figure(name=f"forward of a model that fits, {name}, over plain", value=ratio, goal=OVERHEAD_GOAL))
    return found


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny tries the harness out")
    parser.add_argument("--count", type=int, default=1000, help="leases of each kind (default: %(default)s)")


def main() -> None:
    """Command line."""
    arguments = arguments_of("acquire", __doc__, _options)
    runner = Runner("benchmarks.acquire", timeout_s=arguments.timeout)
    checkpoint = made_by("benchmarks.stream_checkpoints", "small", "--size", arguments.size, folder=arguments.dir)
    job = {"checkpoint": str(checkpoint), "count": arguments.count}
    leases, overhead = (runner.run({**job, "part": part}) for part in PARTS)
    figures = figures_of(leases, overhead, arguments.count)
    finish(arguments, None, figures, {"leases": leases, "overhead_s": overhead})


if __name__ == "__main__":
    main_or_worker(main, worker)
