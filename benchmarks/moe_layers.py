"""Random layers on random machines: what the scheduler is held against the best schedule on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penstock.scheduler.experts.bruteforce import MOST
from penstock.scheduler.experts.costs import ExpertCosts
from penstock.scheduler.experts.timelines import ExpertTask
from penstock.scheduler.hardware import Sharing


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomLayer:
    """One of them."""

    kind: str
    """decode: one row each. batch: few. prefill: many."""
    tasks: tuple[ExpertTask, ...]
    costs: ExpertCosts


def random_layer(seed: int) -> RandomLayer:
    """The layer of a seed: up to MOST experts of a decode step, a batch or a prompt, some on the device, most in host
    memory and, in every second layer, some on disk; on a machine whose parts differ by up to a factor of 16."""
    random = np.random.default_rng(seed)
    kind = ("decode", "batch", "prefill")[seed % 3]
    count = int(random.integers(2, MOST + 1))
    most_rows = {"decode": 1, "batch": 8, "prefill": 256}[kind]
    rows = random.integers(1, most_rows + 1, count)
    on_device = random.random(count) < random.choice([0.0, 0.25, 0.5, 0.75])
    on_disk = random.random(count) < (random.choice([0.1, 0.3]) if seed % 2 else 0.0)
    tasks = tuple(
        ExpertTask(
            expert=number, rows=int(rows[number]), on_device=bool(on_device[number]), on_host=not on_disk[number]
        )
        for number in range(count)
    )
    return RandomLayer(kind=kind, tasks=tasks, costs=_machine(random))


def _machine(random: np.random.Generator) -> ExpertCosts:
    """In units of the time of a copy: the CPU from a quarter of it to 4 times it, the disk from half to 8 times."""
    cpu_s, read_s = (float(2.0**e) for e in (random.uniform(-2, 2), random.uniform(-1, 3)))
    device_s = float(2.0 ** random.uniform(-6, -1))
    # Rows from which on arithmetic binds and not the weights' bytes.
    cpu_knee, device_knee = (float(2.0**e) for e in (random.uniform(1, 5), random.uniform(5, 8)))
    shared = random.random() < 0.5
    left = [float(random.uniform(0.6, 1.0)) if shared else 1.0 for _ in range(4)]
    return ExpertCosts(
        cpu_s=lambda rows: cpu_s * max(1.0, rows / cpu_knee),
        device_s=lambda rows: device_s * max(1.0, rows / device_knee),
        copy_s=1.0,
        read_s=read_s,
        cpu_start_s=float(random.uniform(0, 0.2)),
        sharing=Sharing(
            compute_while_copying=left[0],
            copy_while_computing=left[1],
            compute_while_reading=left[2],
            read_while_computing=left[3],
        ),
    )
