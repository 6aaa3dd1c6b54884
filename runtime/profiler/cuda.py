"""Spans on a CUDA stream, from timing events that are read long after they have completed.

Nothing on the hot path waits: an event pair is recorded around a span, and a later look (`poll`) reads those that have
completed. An event's time is its distance from an anchor, an event whose host time is known because the host waited for
it: once, when the recording begins. `cudaEventElapsedTime` answers in float32 milliseconds, which resolves less and
less as the distance grows; so from time to time a completed event becomes the next anchor, itself placed from the one
before it, and distances stay below a second or two.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

logger = logging.getLogger(__name__)

_cuda: Final[Any] = torch.cuda
REANCHOR_MS: Final = 1000.0
"""Distance from the anchor from which on an event replaces it: float32 resolves 0.06 µs there."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Begun:
    launched: int
    event: Any


@dataclass(kw_only=True, slots=True, eq=False)
class _Pending:
    launched: int
    begin: Any
    end: Any
    done: Callable[[int, int, int], None]


class CudaClock:
    """Spans of what one device computes, on the stream that is current where they begin and end."""

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)
        self._pending: deque[_Pending] = deque()
        self._spare: list[Any] = []
        self._lock = threading.Lock()
        self._polling = threading.Lock()
        """Two threads poll at the end; the anchor and its time change together."""
        self._failed = False
        with _cuda.device(self._device):
            self._anchor = self._event()
            _cuda.synchronize(self._device)  # once, before anything is recorded
            self._anchor.record()
            self._anchor.synchronize()
        self._anchor_ns = time.monotonic_ns()

    def begin(self) -> _Begun | None:
        """A span starts after what the current stream holds now; None while a CUDA graph is captured.

        An event that is recorded then becomes part of the graph, has no time, and fails when it is asked for one.
        """
        if self._failed or _cuda.is_current_stream_capturing():
            return None
        event = self._event()
        event.record(_cuda.current_stream(self._device))
        return _Begun(launched=time.monotonic_ns(), event=event)

    def end(self, begun: _Begun | None, done: Callable[[int, int, int], None]) -> None:
        """It ends after what the current stream holds now; `done` is called by a later `poll`."""
        if begun is None or self._failed or _cuda.is_current_stream_capturing():
            return
        event = self._event()
        event.record(_cuda.current_stream(self._device))
        with self._lock:
            self._pending.append(_Pending(launched=begun.launched, begin=begun.event, end=event, done=done))

    def poll(self) -> None:
        """Tell the times of all spans that have completed (called by the sampling thread)."""
        with self._polling:
            try:
                self._poll()
            except RuntimeError as error:
                self._fail(error)

    def _poll(self) -> None:
        while True:
            with self._lock:
                if not self._pending or not self._pending[0].end.query():
                    return
                first = self._pending.popleft()
            start, end = self._place(first.begin), self._place(first.end)
            first.done(first.launched, start, end)
            with self._lock:  # an anchor is never recorded again, and is dropped when the next one takes its place
                self._spare += [event for event in (first.begin, first.end) if event is not self._anchor]

    def finish(self) -> None:
        """Wait for what is under way, at the end of a recording, and tell it."""
        try:
            _cuda.synchronize(self._device)
        except RuntimeError as error:
            self._fail(error)
        self.poll()

    def _fail(self, error: RuntimeError) -> None:
        """After an error on the device every call fails: it is the program's to raise, and not ours a second time."""
        self._failed = True
        with self._lock:
            self._pending.clear()
        logger.warning("spans on %s are lost from here on: %s", self._device, error)

    def _place(self, event: Any) -> int:
        distance_ms = float(self._anchor.elapsed_time(event))
        at: int = self._anchor_ns + round(distance_ms * 1e6)
        if distance_ms > REANCHOR_MS:
            self._anchor, self._anchor_ns = event, at
        return at

    def _event(self) -> Any:
        with self._lock:
            if self._spare:
                return self._spare.pop()
        return _cuda.Event(enable_timing=True)
