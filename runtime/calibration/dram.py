"""How fast memory is read, written and copied, by threads: with libc's own loops, which release the GIL."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Final

from ...memory.arena import PAGE, HostArena
from ...scheduler.curves import Curve
from .sampling import Clock, curve, in_turns

_libc: Final = ctypes.CDLL(None)
_libc.memchr.restype = ctypes.c_void_p
_libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
_FILLED: Final = 1
_SOUGHT: Final = 2
"""Never there, so that all of it is read."""
SAMPLE_S: Final = 0.02
"""A repetition should last so long: starting threads takes some tenths of a millisecond."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryOperation:
    """A way to use memory."""

    run: Callable[[int, int], None]
    """On (address, bytes)."""
    traffic: float = 1.0
    """Bytes read and written per byte that it is given."""


def _copy(address: int, nbytes: int) -> None:
    ctypes.memmove(address, address + nbytes // 2, nbytes // 2)


OPERATIONS: Final[Mapping[str, MemoryOperation]] = {
    "copy": MemoryOperation(run=_copy),  # half is read, half is written
    "read": MemoryOperation(run=lambda address, nbytes: _libc.memchr(address, _SOUGHT, nbytes)),
    "write": MemoryOperation(run=lambda address, nbytes: _as_nothing(ctypes.memset(address, _FILLED, nbytes))),
}


def _as_nothing(_: Any) -> None:
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRates:
    """Bytes per second by threads."""

    copy: Curve
    """Read and written, both counted."""
    read: Curve
    write: Curve


def memory_rates(
    *,
    nbytes: int,
    threads: Sequence[int],
    seconds: float,
    clock: Clock = perf_counter,
    operations: Mapping[str, MemoryOperation] = OPERATIONS,
) -> MemoryRates:
    """Measure memory.

    Args:
        nbytes: Memory to use, more than the caches hold.
        threads: How many, for each point; they share the memory.
        seconds: About so long.
        clock: Seconds since any moment.
        operations: "copy", "read" and "write".
    """
    arena = HostArena(nbytes, tier="measuring")
    try:
        ctypes.memset(arena.address, _FILLED, arena.nbytes)  # first touches are not counted
        found = {}
        for name, operation in operations.items():
            once = partial(_once, operation, arena, clock)
            taken = arena.nbytes / once(1, 1)
            passes = max(1, round(SAMPLE_S / taken)) if taken > 0 else 1
            found[name] = curve(
                in_turns(
                    {count: partial(once, count, passes) for count in threads},
                    seconds=seconds / len(operations),
                    clock=clock,
                )
            )
    finally:
        arena.close()
    return MemoryRates(copy=found["copy"], read=found["read"], write=found["write"])


def _once(operation: MemoryOperation, arena: HostArena, clock: Clock, threads: int, passes: int) -> float:
    """Bytes per second of some passes over the arena by so many threads."""
    share = arena.nbytes // threads // PAGE * PAGE
    if threads == 1:
        start = clock()
        for _ in range(passes):
            operation.run(arena.address, share)
        return share * passes * operation.traffic / (clock() - start)
    ready = threading.Barrier(threads + 1)

    def work(address: int) -> None:
        ready.wait()
        for _ in range(passes):
            operation.run(address, share)

    workers = [threading.Thread(target=work, args=(arena.address + number * share,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    start = clock()
    ready.wait()
    for worker in workers:
        worker.join()
    return threads * share * passes * operation.traffic / (clock() - start)
