"""The parts of the bound of a training step, measured on all cores: no contender, but run like one."""

import os
import time
from typing import Any

import torch

from penstock.kernels.adamw import AdamWHyper
from penstock.kernels.optimizers import optimizer
from penstock.kernels.scratch import Scratch
from penstock.memory.arena import HostArena
from penstock.memory.disk import DiskEngine
from penstock.memory.image import whole_window
from penstock.memory.store import checksum

from .training import Job, run_worker, started


def rates_worker(job: Job) -> dict[str, Any]:
    """The parts of the bound: the update with its checksum, and the drive, written and read and written at once."""
    started()
    count = 1 << 20
    arena = HostArena(8 * 12 * count)
    raw = arena.view(0, 12 * count)
    arrays = [torch.frombuffer(raw, dtype=torch.float32, count=count, offset=4 * count * i) for i in range(3)]
    for array in arrays:
        array.fill_(0.01)
    gradient, weight = (torch.full((count,), 0.01, dtype=torch.bfloat16) for _ in range(2))
    kernel, scratch = optimizer("adamw"), Scratch.of()

    def best(work: Any, repeats: int = 8) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    update_s = best(
        lambda: kernel.update(arrays[0], arrays[1:], gradient, AdamWHyper(lr=1e-5), step=2, scratch=scratch, out=weight)
    )
    checksum_s = best(lambda: checksum(raw))
    engine, nbytes = DiskEngine(), 12 * count
    path = os.path.join(job.run, "mixed.bin")
    slots = [arena.view(i * nbytes, nbytes) for i in range(8)]
    places = 32
    for place in range(2 * places):
        engine.write(path, place * nbytes, slots[place % 8]).wait()
    start = time.perf_counter()
    for transfer in [engine.write(path, place * nbytes, slots[place % 8]) for place in range(places)]:
        transfer.wait()
    write_rate = places * nbytes / (time.perf_counter() - start)
    mixed = []
    for _ in range(3):
        start = time.perf_counter()
        for place in range(0, places, 4):
            under_way = []
            for i in range(4):
                window = whole_window(path, (place + i) * nbytes, nbytes)
                under_way.append(engine.read([window], [], slots[i]))
                under_way.append(engine.write(path, (places + place + i) * nbytes, slots[4 + i]))
            for transfer in under_way:
                transfer.wait()
        mixed.append(2 * places * nbytes / (time.perf_counter() - start))
    engine.close()
    os.unlink(path)
    return {
        "update_per_s": count / update_s,
        "checksum_per_s": nbytes / checksum_s,
        "mixed_rate": max(mixed),
        "write_rate": write_rate,
    }


if __name__ == "__main__":
    run_worker(rates_worker)
