"""Threads of torch that sleep soon between operations, where others of the process need their cores.

GNU OpenMP has threads that wait for the next operation spin for milliseconds. Where they are as many as cores, what
brings blocks then waits for a core that nothing is computed on, and half of an operation waits for the other half whose
core was taken. Once a process has more of such threads than cores, libgomp has them all go to sleep after 100 turns
instead of 300 000 (`gomp_throttled_spin_count_var`); its settings can only be changed before a process starts. So there
is one thread more here that has computed with several, and waits. Rousing threads is what that costs: microseconds for
each operation that they share (`rouse_s` of a calibration).
"""

from __future__ import annotations

import os
import threading
from typing import Final

import torch

ELEMENTS: Final = 2**17
"""Of an operation that torch has several threads do."""


class RestingThreads:
    """While it is open, torch's threads go to sleep soon. Without effect under another OpenMP than GNU's."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._stay, name="penstock-resting", daemon=True)
        self._thread.start()
        self._ready.wait()

    @staticmethod
    def wanted() -> bool:
        """Whether operations on the CPU take all its cores, so that whoever brings blocks has none left."""
        return torch.get_num_threads() > 1 and len(os.sched_getaffinity(0)) <= torch.get_num_threads()

    def close(self) -> None:
        """Let them spin again, unless others see to that too. May be called twice."""
        self._over.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _stay(self) -> None:
        try:
            with torch.inference_mode():
                torch.ones(ELEMENTS, dtype=torch.float32, device="cpu").mul_(1.0)
        finally:
            self._ready.set()
        self._over.wait()
