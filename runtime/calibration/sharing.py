"""What is left of two rates when both go on at once: products on the CPU, and reads from disk or copies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final

from ...memory.arena import AnyArena, HostArena
from ...memory.disk import CHUNK, THREADS
from ..devices.base import Device
from .disk import EngineMaker
from .diskload import DiskLoad, ProbeFile
from .sampling import Clock, figure

SETTLE_S: Final = 0.03
"""From the start of a load until it is at its rate."""
COPY_NBYTES: Final = 4 * 2**20
COPIES_AHEAD: Final = 2

Counter = Callable[[], int]
"""Bytes moved so far."""
Load = Callable[[], AbstractContextManager[Counter]]
"""Starts something that goes on in other threads until the context is left, at full rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """What each of the two has left of the rate it has alone; 1 is all."""

    compute: float
    load: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """What a load leaves to the CPU, and that to it."""

    product: Shares
    """Products of one row."""
    start: Shares
    """A model's own Python."""


ALONE: Final = Beside(product=Shares(compute=1.0, load=1.0), start=Shares(compute=1.0, load=1.0))
"""Nothing beside it, or nothing known."""


def share(
    compute: Callable[[], object],
    load: Load,
    *,
    seconds: float,
    turns: int = 3,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Shares:
    """Measure the two alone and together, in turns.

    Args:
        compute: Some computing, about ten milliseconds of it.
        load: The other one.
        seconds: For all of it.
        turns: How often; each has a third of its time for either alone and for both.
        clock: Seconds since any moment.
        sleep: Lets time pass.
    """
    span = seconds / (3 * turns)
    alone: list[float] = []
    loaded: list[float] = []
    compute_left: list[float] = []
    load_left: list[float] = []
    compute()
    for _ in range(turns):
        alone.append(_calls_per_second(compute, span, clock))
        with load() as counter:
            sleep(SETTLE_S)
            start, before = clock(), counter()
            sleep(span)
            loaded.append((counter() - before) / (clock() - start))
            start, before = clock(), counter()
            compute_left.append(_calls_per_second(compute, span, clock))
            load_left.append((counter() - before) / (clock() - start))
    return Shares(compute=_fraction(compute_left, alone), load=_fraction(load_left, loaded))


def _calls_per_second(compute: Callable[[], object], seconds: float, clock: Clock) -> float:
    start, calls = clock(), 0
    while True:
        compute()
        calls += 1
        taken = clock() - start
        if taken >= seconds:
            return calls / taken


def _fraction(left: list[float], alone: list[float]) -> float:
    """Of medians; more than all is noise, and nothing at all would be a rate of 0."""
    whole = figure(alone).value if min(alone) > 0 else 0.0
    return max(min(sorted(left)[len(left) // 2] / whole, 1.0), 0.01) if whole else 1.0


def disk_load(file: ProbeFile, arena: HostArena, engines: EngineMaker) -> Load:
    """Reads from one drive, as models read."""

    @contextmanager
    def reading() -> Iterator[Counter]:
        engine = engines(THREADS, CHUNK)
        stop = threading.Event()
        load = DiskLoad(engine, file, arena)
        try:
            with _thread(lambda: load.read_until(stop.is_set), stop):
                yield lambda: engine.statistics().read_nbytes
        finally:
            engine.close()

    return reading


def copy_load(device: Device, host: HostArena, target: AnyArena) -> Load:
    """Copies from the host to the device, one after the other without a gap."""

    @contextmanager
    def copying() -> Iterator[Counter]:
        stop = threading.Event()
        done = 0
        size = min(COPY_NBYTES, host.nbytes)

        def copy() -> None:
            nonlocal done
            pending = []
            while not stop.is_set():
                device.copy(host, 0, target, 0, size)
                pending.append(device.copied())
                if len(pending) > COPIES_AHEAD:
                    device.wait(pending.pop(0))
                    done += size
            for event in pending:
                device.wait(event)

        with _thread(copy, stop):
            yield lambda: done

    return copying


@contextmanager
def _thread(work: Callable[[], None], stop: threading.Event) -> Iterator[None]:
    """Run `work` in a thread until the end of the context; its error is raised there."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # whatever it is, it belongs to the thread that measures
            errors.append(error)

    thread = threading.Thread(target=run, name="penstock-calibration-load", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]
