"""How long it takes until a thread goes on that waits for another one, as micro-batches do for a processor."""

from __future__ import annotations

import threading
import time
from time import perf_counter
from typing import Final

import torch

from .sampling import Clock, Figure, in_turns

PASSES: Final = 20
"""In one repetition."""
REST_S: Final = 1e-3
"""That the other one has waited by then, at least, so that its core has gone to rest."""
BUSY: Final = 20
"""Small operations that who hands on goes on with: it does not give Python up at once."""
ELEMENTS: Final = 64


def switch_cost(*, seconds: float, clock: Clock = perf_counter, passes: int = PASSES) -> Figure:
    """Seconds from one thread's leave to go on until the other one does.

    Args:
        seconds: About so long.
        clock: Seconds since any moment.
        passes: In one repetition.
    """
    pair = _Pair(clock)
    return in_turns({1: lambda: pair.waited_s(passes) / passes}, seconds=seconds, clock=clock)[1]


class _Pair:
    """Two threads that pass one turn to and fro."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._batons = (threading.Semaphore(0), threading.Semaphore(0))
        self._handed_on = 0.0
        self._waited = 0.0

    def waited_s(self, passes: int) -> float:
        """Sum over so many passes."""
        self._waited = 0.0
        other = threading.Thread(target=self._take_turns, args=(1, passes // 2), name="penstock-switching")
        other.start()
        self._handed_on = self._clock()
        self._batons[0].release()
        self._take_turns(0, passes // 2)
        other.join()
        return self._waited

    def _take_turns(self, side: int, turns: int) -> None:
        x = torch.ones(ELEMENTS)
        for _ in range(turns):
            self._batons[side].acquire()
            self._waited += self._clock() - self._handed_on
            time.sleep(REST_S)
            self._handed_on = self._clock()
            self._batons[1 - side].release()
            for _ in range(BUSY):
                x + x
