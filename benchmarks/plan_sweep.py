"""The plan that is chosen, against others that are actually run: who computes, what stays where, how deep the ring is.

    python -m benchmarks.plan_sweep
    python -m benchmarks.plan_sweep --link 4GiB --device-budget 512MiB

A checkpoint of 1 GiB on an emulated device. The machine is calibrated for that device; the plan that `load` chooses is
saved; every other setting is that plan edited, and carried out as it is. Settings take turns, in two rounds, so that a
machine that slows down slows all of them. The figure is seconds per token of the chosen plan over the best one's.
"""

import argparse
import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .inference import ContenderFailedError, parse_nbytes
from .streams import Figure, Job, Runner, arguments_of, finish, made_by, main_or_worker, table

GOAL = 1.05
ROUNDS = 2
ROWS = 64
CHOSEN = "chosen"


def worker(job: Job) -> dict[str, Any]:
    """Plan, or carry a plan out and measure its tokens."""
    import time

    import torch

    import penstock
    from penstock.caches import calibration_cache
    from penstock.devices import open_device
    from penstock.runtime.calibration.calibrate import calibrate
    from penstock.scheduler.planfile import write_plan

    if job["do"] == "plan":
        device = open_device(job["device"])
        try:
            calibration_cache().write(calibrate(device), device)
        finally:
            device.close()
        budgets = {"device": job["device_nbytes"], "host": job["host_nbytes"]}
        model = penstock.load(job["checkpoint"], device=job["device"], max_memory=budgets)
        write_plan(job["plan"], model.penstock.plan, force=True)
        penstock.close(model)
        return {}
    model = penstock.load(job["checkpoint"], device=job["device"], plan=job["plan"])
    ids = torch.randint(300, 1000, (1, 32), generator=torch.Generator().manual_seed(0))
    cache, given, seconds = None, ids, []
    with torch.no_grad():
        for _ in range(job["tokens"]):
            start = time.perf_counter()
            output = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, given = output.past_key_values, output.logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - start)
    penstock.close(model)
    return {"token_s": statistics.median(seconds[4:])}


def settings(plan: Any) -> Iterator[tuple[str, Any]]:
    """The chosen plan, and others."""
    yield CHOSEN, plan
    homes = {"as planned": lambda block: block.home, "prefix": _prefix(plan), "all copied": _copied(plan)}
    for (home, home_of), processor, factor in itertools.product(homes.items(), ("device", "half", "cpu"), (1, 2)):
        blocks = []
        for block in plan.blocks:
            where = home_of(block)
            taken = where == "host" and (processor == "cpu" or (processor == "half" and block.id % 2 == 0))
            rows = ROWS if taken else 0
            blocks.append(
                dataclasses.replace(block, home=where, cpu_rows_below=rows, processor="cpu" if rows else "device")
            )
        yield (
            f"homes {home}, computed by {processor}, ring x {factor}",
            dataclasses.replace(plan, blocks=tuple(blocks), slots=max(2, plan.slots // 2 * factor)),
        )


def _prefix(plan: Any) -> Any:
    """As many bytes on the device as are planned there, from the first block on."""
    room, kept = plan.home_nbytes("device"), set[int]()
    for block in plan.blocks:
        if block.nbytes <= room:
            kept.add(block.id)
            room -= block.nbytes
    return lambda block: "device" if block.id in kept or block.id == 0 else "host"


def _copied(plan: Any) -> Any:
    """Nothing on the device but what has to be there."""
    return lambda block: "device" if block.id == 0 or block.slot_nbytes > plan.slot_nbytes else "host"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--link", type=parse_nbytes, default=2 * 2**30, help="bytes per second (default: 2GiB)")
    parser.add_argument("--device-budget", type=parse_nbytes, default=384 * 2**20, help="default: 384MiB")
    parser.add_argument("--host-budget", type=parse_nbytes, default=2 * 2**30, help="default: 2GiB")
    parser.add_argument("--new-tokens", type=int, default=12)


def main() -> None:
    """Command line."""
    arguments = arguments_of("plan_sweep", __doc__, _options)
    runner = Runner("benchmarks.plan_sweep", timeout_s=arguments.timeout)
    checkpoint = made_by("benchmarks.stream_checkpoints", "target", folder=arguments.dir)
    device = f"emulated:h2d={arguments.link / 2**20:.0f}MiB/s,d2h={arguments.link / 2**20:.0f}MiB/s"
    from penstock.scheduler.planfile import read_plan, write_plan

    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        job = {"checkpoint": str(checkpoint), "device": device, "plan": str(path), "tokens": arguments.new_tokens}
        budgets = {"device_nbytes": arguments.device_budget, "host_nbytes": arguments.host_budget}
        runner.run({**job, **budgets, "do": "plan"})
        chosen = read_plan(path)
        for _ in range(ROUNDS):
            for name, plan in settings(chosen):
                write_plan(path, plan, force=True)
                try:
                    token_s = runner.run({**job, "do": "run"})["token_s"]
                except ContenderFailedError as error:  # a setting that does not fit is none
                    print(f"{name}: {error}", flush=True)
                    continue
                found.setdefault(name, []).append(token_s)
    times = {name: min(each) for name, each in found.items() if len(each) == ROUNDS}
    best = min(times.values())
    rows = [
        [name, f"{seconds * 1e3:.1f}", f"{seconds / best:.3f}"] for name, seconds in sorted(times.items(), key=_by_s)
    ]
    ratio = times[CHOSEN] / best
    figures = [
        Figure(name="the chosen plan over the best of those run", value=ratio, goal=GOAL),
        Figure(name="settings run", value=len(times), goal=12, at_least=True),
    ]
    columns = ("setting", "ms per token", "over the best")
    finish(arguments, table(f"plans on {device}", columns, rows), figures, times)


def _by_s(item: tuple[str, float]) -> float:
    return item[1]


if __name__ == "__main__":
    main_or_worker(main, worker)
