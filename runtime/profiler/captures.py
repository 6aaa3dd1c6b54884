"""Calls of CUDA that do no harm to a graph that some thread is capturing at that moment.

While a thread captures a CUDA graph in the mode "global", which is torch's default, CUDA forbids what it calls
potentially unsafe calls to *every* thread of the process; asking an event whether it has completed is one of them. The
call fails, and what is worse, the program's capture is broken. Not to ask while `is_current_stream_capturing()` does
not help: it knows the calling thread's current stream only, and no function tells of captures in other threads. Nor
does asking only from the thread that computes: it may capture on a stream that is not current at that moment.

CUDA's own way out is `cudaThreadExchangeStreamCaptureMode`: a thread whose mode is "relaxed" may make such calls
whatever others capture, as long as the call is not about a captured stream or event. (The caching allocators of torch
and the watchdog of its process groups do so.) Every call here is about streams and events of our own that are recorded
outside captures. The mode belongs to the thread, and is put back.

The driver's function is called, not the runtime's: torch exports neither, there is only one driver in a process
whichever runtime torch was linked with, and the runtime's would make a context on device 0 for a thread that has none.
On ROCm queries break other threads' captures in any mode (a known fault of HIP): there is no way there.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

logger = logging.getLogger(__name__)

_cuda: Final[Any] = torch.cuda
_RELAXED: Final = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED"""


@contextmanager
def aside(index: int) -> Iterator[bool]:
    """Whether potentially unsafe calls may be made to the device with this number inside, by the calling thread.

    CUDA must have been initialised: by the program, not by us. The device is the thread's current one meanwhile.
    """
    exchange = exchange_mode()
    if exchange is None:
        yield False
        return
    with _cuda.device(index):  # first, because the exchange may want the thread to have a context
        mode = ctypes.c_int(_RELAXED)
        if exchange(ctypes.byref(mode)) != 0:
            yield False
            return
        try:
            yield True
        finally:
            exchange(ctypes.byref(mode))  # it holds what was before


@functools.cache
def exchange_mode() -> Callable[[Any], int] | None:
    """`cuThreadExchangeStreamCaptureMode` of the driver that is loaded; None where there is no such thing."""
    if torch.version.hip is not None:
        return None
    try:
        function = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError) as error:
        logger.info("the times of CUDA's spans will be the host's: %s", error)
        return None
    function.argtypes = (ctypes.POINTER(ctypes.c_int),)
    function.restype = ctypes.c_int
    return function
