"""Spans on a CUDA stream, from timing events that are read long after they have completed.

Nothing waits for what the program has enqueued: an event pair is recorded around a span, and a later look (`poll`)
reads those that have completed. Where the device's clock stands is found on a stream of our own, which is idle.
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

from .alignment import Alignment
from .captures import aside

logger = logging.getLogger(__name__)

_cuda: Final[Any] = torch.cuda
ALIGN_NS: Final = 10**9
"""How often host and device compare their clocks."""
TRIALS: Final = 5
"""How often they do at a time; the quickest tells most exactly."""
PATIENCE_NS: Final = 200_000
"""How long a trial may take. An event on an idle stream takes about 10 µs."""
MOST_PENDING: Final = 2**16
"""Spans that may wait for their times; what comes beyond is not recorded."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Begun:
    launched: int
    event: Any


@dataclass(kw_only=True, slots=True, eq=False)
class _Pending:
    launched: int
    begin: Any
    end: Any
    ended: int
    """When the end was launched."""
    done: Callable[[int, int, int], None]


class CudaClock:
    """Spans of what one device computes, on the stream that is current where they begin and end.

    To be made while the calling thread captures no graph, after the program has initialised CUDA.

    Args:
        index: Of the device.
        clock: Nanoseconds, monotonic.

    Raises:
        RuntimeError: the device has failed, or there is no way to read events without harm (see `captures`).
    """

    def __init__(self, index: int, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._index = index
        self._device = torch.device("cuda", index)
        self._clock = clock
        self._pending: deque[_Pending] = deque()
        self._spare: list[Any] = []
        self._lock = threading.Lock()
        self._polling = threading.Lock()
        """Two threads poll at the end."""
        self._failed = False
        self._pairs = 0
        self._alignment = Alignment()
        self._aligned_ns = 0
        with aside(index) as safe:
            if not safe:
                raise RuntimeError("events cannot be read without harm to graphs that are captured meanwhile")
            self._side = _cuda.Stream(self._device)
            self.error_ns = self._align(patient=True)
            """Within how much host and device agree on what time it is."""
            self._pair_ns = self._measure_pair()

    @property
    def spent_ns(self) -> int:
        """What recording events has taken, by what a pair took when this was made."""
        return self._pairs * self._pair_ns

    def begin(self) -> _Begun | None:
        """A span starts after what the current stream holds now; None while a CUDA graph is captured.

        An event that is recorded then becomes part of the graph, has no time, and fails when it is asked for one.
        """
        if self._failed or len(self._pending) >= MOST_PENDING or _cuda.is_current_stream_capturing():
            return None
        event = self._event()
        launched = self._clock()
        event.record(_cuda.current_stream(self._device))
        return _Begun(launched=launched, event=event)

    def end(self, begun: _Begun | None, done: Callable[[int, int, int], None]) -> None:
        """It ends after what the current stream holds now; `done` is called by a later `poll`."""
        if begun is None or self._failed or _cuda.is_current_stream_capturing():
            return
        event = self._event()
        ended = self._clock()
        event.record(_cuda.current_stream(self._device))
        self._pairs += 1
        pending = _Pending(launched=begun.launched, begin=begun.event, end=event, ended=ended, done=done)
        with self._lock:
            self._pending.append(pending)

    def poll(self) -> None:
        """Tell the times of all spans that have completed. Called by the sampling thread, which computes nothing."""
        with self._polling:
            if self._failed:
                return
            try:
                with aside(self._index) as safe:
                    if safe:
                        self._poll()
            except RuntimeError as error:
                self._fail(error)

    def finish(self) -> None:
        """Wait for the spans that are under way, and for nothing else, at the end of a recording, and tell them."""
        try:
            with aside(self._index) as safe:
                if not safe or self._failed:
                    return
                with self._lock:
                    pending = list(self._pending)
                for span in pending:  # of several streams, perhaps
                    span.end.synchronize()
        except RuntimeError as error:
            self._fail(error)
        self.poll()

    def _poll(self) -> None:
        # Clocks first: what is read from here on may be later on the device than an event that is met now.
        if self._clock() - self._aligned_ns >= ALIGN_NS:
            self._align(patient=False)
        while True:
            with self._lock:
                if not self._pending or not self._pending[0].end.query():
                    return
                first = self._pending.popleft()
            start = self._alignment.place(first.begin, first.launched)
            end = max(start, self._alignment.place(first.end, first.ended))
            first.done(first.launched, start, end)
            with self._lock:
                self._spare += (first.begin, first.end)

    def _align(self, *, patient: bool) -> int:
        """Compare the clocks: find out when an event happens, the more exactly the less time passes around it.

        Where all streams share one queue (CUDA_DEVICE_MAX_CONNECTIONS=1), ours is not idle when others are not: then
        the last comparison serves on. `patient` waits all the same. Returns the error, in nanoseconds; -1 where there
        was no answer.
        """
        self._aligned_ns = self._clock()
        best: tuple[int, int, int, Any] | None = None
        with _cuda.stream(self._side):
            if _cuda.is_current_stream_capturing():  # torch has few streams, and hands them out again
                if patient:
                    raise RuntimeError("the stream that clocks were to be compared on is being captured")
                return -1
        for trial in range(TRIALS):
            event = _cuda.Event(enable_timing=True)  # never a spare one: it stays as long as the alignment
            before = self._clock()
            event.record(self._side)
            if not self._completes(event, before):
                if not patient or trial:
                    continue
                event.synchronize()
            after = self._clock()
            if best is None or after - before < best[0]:
                best = after - before, (before + after) // 2, after, event
        if best is None:
            return -1
        took, host_ns, met_ns, event = best
        self._alignment.meet(event, host_ns, met_ns)
        return took // 2

    def _completes(self, event: Any, since_ns: int) -> bool:
        while not event.query():
            if self._clock() - since_ns > PATIENCE_NS:
                return False
        return True

    def _measure_pair(self) -> int:
        """What recording a span takes, on the stream that is ours."""
        events = [self._event() for _ in range(2 * TRIALS)]
        start = self._clock()
        for event in events:
            _cuda.is_current_stream_capturing()
            _cuda.current_stream(self._device)
            event.record(self._side)
        taken = self._clock() - start
        self._spare += events
        return taken // TRIALS

    def _fail(self, error: RuntimeError) -> None:
        """After an error on the device every call fails: it is the program's to raise, and not ours a second time."""
        self._failed = True
        with self._lock:
            self._pending.clear()
        logger.warning("spans on %s are lost from here on: %s", self._device, error)

    def _event(self) -> Any:
        with self._lock:
            if self._spare:
                return self._spare.pop()
        return _cuda.Event(enable_timing=True)
