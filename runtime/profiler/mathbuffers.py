"""MKL's buffers: what its products pack pieces of matrices into, and keep for the next one.

A thread that multiplies large matrices has some, of up to ten megabytes each; in a training of small models that is
most of what is in use and no tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from .pages import anonymous_nbytes, resident_nbytes
from .recorder import Recorder
from .schema import MKL, Category, Tier

SYMBOL: Final = "mkl_serv_mem_stat"
"""What MKL's header calls `mkl_mem_stat`: bytes that it has allocated, and in how many buffers."""

Allocated = Callable[[], int]


def mkl_allocated() -> Allocated | None:
    """What tells how many bytes MKL has allocated for itself; None where torch computes without it.

    A call takes some 50 µs, and may come from any thread.
    """
    for library in (torch.__path__[0] + "/lib/libtorch_cpu.so", None):
        if library is not None and not Path(library).exists():
            continue
        try:
            function: Any = getattr(ctypes.CDLL(library), SYMBOL)
        except (OSError, AttributeError):
            continue
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.POINTER(ctypes.c_int)]
        return lambda: int(function(ctypes.byref(ctypes.c_int(0))))
    return None


def watch_math_buffers(recorder: Recorder) -> Callable[[int], None]:
    """Who is to be told how much is free, so that MKL's buffers are counted; nobody listens where there is no MKL."""
    allocated = mkl_allocated()
    return _nobody if allocated is None else MathBuffers(recorder, allocated=allocated).looked


def _nobody(freed: int) -> None:
    """There is no MKL."""


class MathBuffers:
    """Counts MKL's buffers as an arena, as far as they are resident.

    MKL tells what it has allocated, and not what of it was ever touched. That cannot be more than what is resident, in
    no file, in use, and nothing else that is known, at any moment since MKL last allocated: the least of these counts.
    At some moments much is in use that nobody knows, such as activations of a step that is not looked at; at others
    little. So pages of libraries are never told as buffers, and other memory hardly ever.

    Args:
        allocated: Bytes that MKL has allocated for itself. Those from before the recording are in its baseline.
        resident: Bytes of resident pages now.
        anonymous: Bytes of resident pages in no file.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        allocated: Allocated,
        resident: Callable[[], int] = resident_nbytes,
        anonymous: Callable[[], int] = anonymous_nbytes,
    ) -> None:
        self._recorder = recorder
        self._allocated = allocated
        self._anonymous = anonymous
        self._before = allocated()
        self._in_files = max(0, resident() - anonymous())
        """What the baseline has of resident pages of files."""
        self._row = recorder.module(path=MKL, kind="buffers")
        self._grown = 0
        self._counted = 0

    def looked(self, freed: int) -> None:
        """So many resident bytes are free at this moment: count anew."""
        grown = max(0, self._allocated() - self._before)
        others = max(0, self._recorder.named_on_host() - self._counted - self._in_files)
        most = min(grown, max(0, self._anonymous() - freed - others))
        now = most if grown != self._grown else min(most, self._counted)
        self._recorder.memory(now - self._counted, Tier.HOST, Category.ARENA, module=self._row)
        self._grown, self._counted = grown, now
