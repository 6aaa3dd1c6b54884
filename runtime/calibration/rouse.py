"""What operations take more where two threads of a process compute with several threads each.

torch's threads belong to the thread that calls them. GNU OpenMP has them wait awake between operations, but as soon as
a process has more of them than cores, those of a second thread included that has nothing to do, they go to sleep at
once, and each operation has to rouse them (`gomp_throttled_spin_count_var` of libgomp: 100 turns instead of 300 000).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Final

import torch

from .sampling import Clock, Figure, in_turns
from .timing import Timer

ELEMENTS: Final = 2**17
"""Of an operation: several threads share it, and its data stay in their caches."""
CALLS: Final = 200
"""In one repetition."""


@torch.no_grad()
def rouse_cost(*, seconds: float, timer: Timer, clock: Clock = perf_counter, calls: int = CALLS) -> Figure:
    """Seconds per operation; next to nothing where there is one thread, or another OpenMP.

    Args:
        seconds: About so long.
        timer: By the host's clock.
        clock: Seconds since any moment, for `seconds` only.
        calls: In one repetition.
    """
    x = torch.ones(ELEMENTS)

    def operations() -> None:
        for _ in range(calls):
            x.mul_(1.0)

    def beside() -> float:
        with _another():
            operations()
            return timer.seconds(operations) / calls

    operations()
    found = in_turns({1: lambda: timer.seconds(operations) / calls, 2: beside}, seconds=seconds, clock=clock, pick=min)
    more = max(found[2].value - found[1].value, 1e-9)
    return Figure(value=more, spread=(found[1].spread * found[1].value + found[2].spread * found[2].value) / more)


@contextmanager
def _another() -> Iterator[None]:
    """A second thread that has computed with several threads, and waits."""
    computed, over = threading.Event(), threading.Event()

    def run() -> None:
        torch.ones(ELEMENTS).mul_(1.0)
        computed.set()
        over.wait()

    thread = threading.Thread(target=run, name="penstock-calibration-other", daemon=True)
    thread.start()
    try:
        computed.wait()
        yield
    finally:
        over.set()
        thread.join()
