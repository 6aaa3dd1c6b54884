"""Launches and kernels of a few steps, from kineto: how long work queues on a device.

Kineto's memory and time grow with every kernel, so it runs once in a recording, for a few steady steps, and hands over
two sums. Beginning and ending cost the program a moment each (CUPTI is loaded; the device is waited for at the end).
There can be one user of kineto in a process: a program that profiles itself comes first, and ours ends.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from .device import UsedDevice
from .guard import harmless
from .queueing import queued
from .recorder import Recorder
from .schema import Launches, MarkKind

logger = logging.getLogger(__name__)

_cuda: Final[Any] = torch.cuda
_profiler: Final[Any] = torch.autograd.profiler
WARM_STEPS: Final = 3
"""Steps on the device before: caches are cold in the first ones."""
STEPS: Final = 3
"""Steps that are looked at."""
LONG_ENOUGH_NS: Final = 10**9
"""After which no further step is begun."""
MOST_NS: Final = 2 * 10**9
"""After which a step is cut, so that one that never ends does not fill the memory."""


@dataclass(kw_only=True, slots=True)
class _Session:
    """Kineto at work."""

    kineto: Any
    thread: int
    """Only the thread that began can end it."""
    start: int
    steps: int = 0
    """Those that are over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Finished:
    """What kineto saw, not yet summed."""

    results: Any
    start: int
    end: int
    steps: int


class KernelWatch:
    """Runs kineto for a few steps of a recording, while it is entered. A listener of `ModuleWatch`, to see time pass.

    Args:
        used: The device. Without one nothing happens, and CUDA is not asked anything.
    """

    def __init__(self, recorder: Recorder, used: UsedDevice) -> None:
        self._recorder = recorder
        self._used = used
        self._warm = 0
        self._over = False
        """Whether no session is to begin any more."""
        self._session: _Session | None = None
        self._finished: list[_Finished] = []
        self._prepare: Callable[[Any], Any] | None = None

    def __enter__(self) -> KernelWatch:
        self._over = _profiler._is_profiler_enabled  # the program profiles itself already
        self._prepare = getattr(_profiler.profile, "_prepare_trace", None)
        if self._prepare is None:
            self._over = True  # a version of torch in which nobody can be given way to
        else:
            _profiler.profile._prepare_trace = self._giving_way(self._prepare)
        self._recorder.on_step.append(self.step_begins)
        return self

    def __exit__(self, *failure: object) -> None:
        self._recorder.on_step.remove(self.step_begins)
        if self._prepare is not None:
            _profiler.profile._prepare_trace = self._prepare
        self._close(whole=failure[:1] == (None,))

    def module_returned(self, row: int, depth: int, inputs: Any, result: Any) -> None:
        """A step that goes on and on is cut."""
        if self._session is not None and self._recorder.clock() - self._session.start > MOST_NS:
            self._cut()

    @harmless
    def step_begins(self) -> bool:
        """Begin before a step, or end after one. Whether that was done, and took time."""
        session = self._session
        if session is not None:
            if session.thread == threading.get_ident():  # else this is a step of another thread
                session.steps += 1
                if session.steps >= STEPS or self._recorder.clock() - session.start >= LONG_ENOUGH_NS:
                    self._end(steps=session.steps)
                    return True
        elif not self._over and self._recorder.alive and self._used.index is not None:
            self._warm += 1
            if self._warm > WARM_STEPS and not _cuda.is_current_stream_capturing():
                self._begin()
                return True
        return False

    def poll(self) -> None:
        """Sum up what has been seen, in the sampling thread: tens of thousands of events take tenths of a second."""
        while self._finished:
            finished = self._finished.pop()
            found = queued(finished.results.events())
            if found.launches:
                self._recorder.add(
                    Launches(
                        start=finished.start,
                        end=finished.end,
                        steps=finished.steps,
                        launches=found.launches,
                        queued=found.ns,
                    )
                )

    def _begin(self) -> None:
        self._over = True  # whatever comes of it
        public: Any = torch.profiler
        if public.ProfilerActivity.CUDA not in public.supported_activities():
            logger.info("no TKLQT: this torch cannot trace kernels")
            return
        # The device's activities only: launches and kernels, and no operators.
        kineto = _profiler.profile(use_cpu=False, use_device="cuda", use_kineto=True)
        kineto.__enter__()
        self._session = _Session(kineto=kineto, thread=threading.get_ident(), start=self._recorder.clock())

    @harmless
    def _cut(self) -> None:
        if self._session is not None and self._session.thread == threading.get_ident():
            self._end(steps=0)

    def _end(self, *, steps: int) -> None:
        if _cuda.is_current_stream_capturing():
            return  # ending waits for the device, which would break the capture: the next step will do
        session, self._session = self._session, None
        assert session is not None
        end = self._recorder.clock()
        session.kineto.__exit__(None, None, None)
        if session.kineto.kineto_results is not None:
            self._finished.append(
                _Finished(results=session.kineto.kineto_results, start=session.start, end=end, steps=steps)
            )
        what = f"{steps} steps" if steps else "a part of a step"
        self._recorder.mark(MarkKind.NOTE, f"kernels were traced for {what} before this")

    @harmless
    def _close(self, *, whole: bool) -> None:
        """End what is under way, if it is; `whole` where a step ends with it."""
        session = self._session
        if session is None or not self._recorder.alive:
            return
        if session.thread == threading.get_ident():
            self._end(steps=session.steps + 1 if whole else 0)
        if self._session is not None:
            self._session = None
            logger.warning("kernels are still being traced: this is another thread, or a graph is being captured")

    def _giving_way(self, prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """What prepares any session of kineto: ours, or one of the program's own, before which ours ends."""

        def prepare_trace(profile: Any) -> Any:
            self._over = True
            self._close(whole=False)
            return prepare(profile)

        return prepare_trace
