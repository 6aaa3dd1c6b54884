"""Which CUDA device a program uses, found out without being the first to use it.

Nothing may ask CUDA anything before the program has initialised it: not how many devices there are either, and not
`torch.cuda.is_available()`, which does so. The driver reads `CUDA_VISIBLE_DEVICES` once, and a process that has asked
cannot be forked any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import torch

_cuda: Final[Any] = torch.cuda
BETWEEN_NS: Final = 20_000_000
"""From one look at the allocator to the next: one takes some ten microseconds."""


class UsedDevice:
    """The device that holds most of what torch has reserved, from when it has reserved anything. Of several, one.

    A program that initialises CUDA and then computes on the processor uses none. Thread-safe: two threads that look at
    once find the same, or one of them finds nothing yet.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.index: int | None = None
        """Once known it stays."""
        self._clock = clock
        self._looked_ns: int | None = None

    def look(self) -> int | None:
        """The device, if there is one by now. Cheap for as long as CUDA is not initialised."""
        if self.index is not None or not _cuda.is_initialized():
            return self.index
        now = self._clock()
        if self._looked_ns is not None and now - self._looked_ns < BETWEEN_NS:
            return None
        self._looked_ns = now
        self.index = _most_used()
        return self.index


def _most_used() -> int | None:
    try:
        reserved = [int(_cuda.memory_reserved(index)) for index in range(_cuda.device_count())]
    except RuntimeError:  # an allocator of the program's own keeps no statistics
        return int(_cuda.current_device())
    most = max(reserved, default=0)
    return reserved.index(most) if most else None
