"""`penstock.Profiler`: records where memory and time go, of models under penstock and of any torch program."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

import msgspec
import torch
from torch import nn

from ...memory.errors import UsageError
from ..build import Machinery
from .activations import ActivationWatch
from .backward import BackwardWatch
from .calls import ModuleWatch
from .clocks import Clock, HostClock, LateClock
from .decorating import Function, recorded
from .device import UsedDevice
from .devicemeters import device_meters
from .facts import header, with_device
from .flights import Flights
from .guard import harmless
from .heap import Heap, HostMemory
from .imports import ImportWatch
from .kernels import KernelWatch
from .mathbuffers import watch_math_buffers
from .meters import all_meters
from .metrics import summarise
from .passes import PassWatch
from .profile import Profile
from .reader import read_profile
from .recorder import Recorder
from .registry import process_registry
from .ring import Ring
from .running import announce
from .sampling import INTERVAL_S, Sampler
from .schema import Category, MarkKind, Tier
from .steps import StepWatch
from .streamed import StreamedModel
from .summary import Summary
from .temporaries import TemporaryWatch
from .tensors import TensorWatch
from .turns import LIGHT_EVENT_NS, LIGHT_STEP_SHARE, StepTurns
from .writer import ProfileWriter

logger = logging.getLogger(__name__)

Level = Literal["light", "full"]
TRIALS: Final = 200
"""Calls of a module that tell what a recorded one costs here."""


class Profiler:
    """Records while it is entered; also a decorator.

        with penstock.Profiler("run.prof") as profiler:
            train()
        print(profiler.summary().verdict)

    `light` records layers, weights, gradients, optimizer states, gauges, and all that a streamed model moves. `full`
    also records every module, its backward, and the activations that autograd saves. Neither changes what the program
    computes.

    Args:
        path: The file to write. It is complete up to the last second at any moment.
        level: "light" or "full".
        force: Overwrite the file if it is there.
        ring_nbytes: Memory for records that are not yet written; the oldest are dropped, and counted, when it is full.

    Raises:
        UsageError: the file is there already, or an argument has no meaning.
        DiskError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        level: Level = "light",
        *,
        force: bool = False,
        ring_nbytes: int = 64 * 2**20,
    ) -> None:
        if level not in ("light", "full"):
            raise UsageError(f"there is no profiler level {level!r}: use 'light' or 'full'")
        self.path = Path(os.path.abspath(path))  # the program may go to another folder
        self.level: Level = level
        self._force = force
        self._ring_nbytes = ring_nbytes
        self._entered: ExitStack | None = None
        self._streamed: list[StreamedModel] = []
        self._spent_ns = 0
        self._header_lock = threading.Lock()
        """What is in the header is replaced by more than one thread."""

    def __enter__(self) -> Profiler:
        if self._entered is not None:
            raise UsageError("this profiler is recording already")
        self._spent_ns = 0
        with ExitStack() as claimed:
            process_registry().claim(self)
            claimed.callback(process_registry().end, self)
            self._enter()
            assert self._entered is not None
            claimed.push(self._entered.pop_all())
            self._entered = claimed.pop_all()
        return self

    def _enter(self) -> None:
        ring = Ring(capacity_nbytes=self._ring_nbytes)
        self._recorder = recorder = Recorder(ring)
        self._writer = ProfileWriter(self.path, header(self.level), ring, recorder.tables, force=self._force)
        with ExitStack() as entered:
            entered.push(self._end)
            self._used, self._device_told = UsedDevice(), False
            self._clock = clock = LateClock(time.monotonic_ns, self._device_clock, recorder.failed)
            self._hook_ns = _hook_ns()
            full = self.level == "full"
            self._turns = turns = StepTurns() if full else StepTurns(event_ns=LIGHT_EVENT_NS, share=LIGHT_STEP_SHARE)
            recorder.on_step.append(lambda: turns.begins(recorder.clock(), recorder.hooks))
            self._watch = watch = ModuleWatch(recorder, clock, every=full, steps=turns)
            self._tensors = tensors = TensorWatch(recorder, watch, at_once=full, turns=None if full else turns)
            entered.callback(tensors.close)
            interval_s = INTERVAL_S[self.level]
            kernels = KernelWatch(recorder, self._used)
            also = (self._tell_device, clock.poll, kernels.poll, tensors.look_again, self._spend)
            meters = all_meters(self.level, recorder.named_on_host, watch_math_buffers(recorder))
            self._sampler = Sampler(recorder, meters, also=also, interval_s=interval_s)
            self._tell_device()  # where the program uses one already, its meters are read from the start
            entered.enter_context(self._sampler)
            entered.callback(clock.finish)
            in_use = HostMemory(Heap.find()).in_use
            before_nbytes = in_use()
            self._steps = entered.enter_context(StepWatch(recorder, watch, tensors, clock))
            watch.listen(self._steps)
            backward = BackwardWatch(recorder, watch, clock)
            watch.listen(backward)
            watch.listen_to_graphs(backward.module_returned)
            entered.callback(backward.close)
            if full:
                activations = entered.enter_context(ActivationWatch(recorder, watch, tensors, turns))
                flights = Flights(recorder, lambda key: tensors.holds(key) or activations.holds(key), turns)
                entered.enter_context(flights)
                entered.enter_context(PassWatch(recorder, flights, backward))
                self._steps.look_at_temporaries(entered.enter_context(TemporaryWatch(recorder, flights)))
                watch.listen_to_results(flights.module_returned)
                entered.enter_context(kernels)
                watch.listen_to_results(kernels.module_returned)
            entered.enter_context(watch)
            entered.callback(announce(self.path).close)
            process_registry().begin(self)
            tensors.watch_what_is_there()
            # what was there before, less what of it has a name by now
            recorder.memory(max(0, before_nbytes - recorder.live[Tier.HOST]), Tier.HOST, Category.BASELINE)
            entered.enter_context(ImportWatch(recorder, in_use))
            self._entered = entered.pop_all()

    def _device_clock(self) -> Clock | None:
        """The clock of the device that the program uses, once it does; called by the thread that computes there."""
        index = self._used.look()
        if index is None or torch.cuda.is_current_stream_capturing():
            return None
        from .cuda import CudaClock

        clock = CudaClock(index)
        self._recorder.mark(
            MarkKind.NOTE,
            f"spans have the times of cuda:{index} from here on, within {clock.error_ns / 1000:.0f} µs of the host's",
        )
        return clock

    @harmless
    def _tell_device(self) -> None:
        """Facts and meters of the device that the program uses, once it does; called again and again."""
        index = None if self._device_told else self._used.look()
        if index is None:
            return
        self._device_told = True  # a device that does not answer is not asked again
        self._sampler.add(device_meters(index))
        with self._header_lock:
            self._writer.header = with_device(self._writer.header, index)

    def _spend(self) -> None:
        """Tell the file what recording has cost so far."""
        own_ns = self._sampler.own_ns + self._recorder.hooks * self._hook_ns + self._clock.spent_ns
        self._writer.add_own_ns(own_ns - self._spent_ns)
        self._spent_ns = own_ns

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entered, self._entered = self._entered, None
        assert entered is not None, "__exit__ without __enter__"
        entered.__exit__(kind, error, trace)

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """The last step of leaving: everything that records has stopped."""
        if not self._recorder.alive:
            return  # a forked child: the file is its parent's
        for model in self._streamed:
            model.close()
        self._streamed.clear()
        self._recorder.end_step()
        failure = "" if error is None or isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            self._recorder.mark(MarkKind.OOM, failure)
        self._recorder.close()
        self._writer.close(failure)

    def __call__(self, function: Function) -> Function:
        """As a decorator: every call of the function is one recording, of which the file keeps the last.

        A call within a call, or beside one, is part of that one's. Coroutine functions and generator functions are
        recorded from their first step to their last.

        Raises:
            UsageError: the function is an asynchronous generator.
        """
        return recorded(self._another, function)

    def _another(self, again: bool) -> Profiler:
        return Profiler(self.path, self.level, force=self._force or again, ring_nbytes=self._ring_nbytes)

    def step(self, phase: str = "step", tokens: int = -1) -> None:
        """A step begins now, and the one before it ends. Without any call steps are found: tokens, optimizer steps."""
        if self._entered is None:
            raise UsageError("step() was called while nothing is recorded: enter the profiler first")
        self._steps.say()
        self._recorder.begin_step(phase, tokens)

    def attach(self, module: nn.Module, machinery: Machinery) -> None:
        """Record a streamed model (called by the registry)."""
        model = StreamedModel(self._recorder, self._watch, module, machinery)
        left_out = model.parameters
        self._tensors.leave_out(left_out)
        self._streamed.append(model)
        machinery.on_close(lambda: self._detach(model, left_out))
        with self._header_lock:
            self._writer.header = _with_model(self._writer.header, machinery)

    def introduce(self, module: nn.Module) -> None:
        """Name the weights of a module that has not been called (called by the registry)."""
        self._watch.register(module)
        self._tensors.watch(module)

    def _detach(self, model: StreamedModel, left_out: set[int]) -> None:
        if model in self._streamed:
            self._streamed.remove(model)
            model.gone()
            self._tensors.leave_out_no_more(left_out)

    def profile(self) -> Profile:
        """What was recorded, read back from the file. After the recording."""
        return read_profile(self.path)

    def summary(self) -> Summary:
        """The figures. After the recording."""
        return summarise(self.profile())


def _hook_ns() -> int:
    """What recording one call of a module takes on this machine: measured, with warm caches, so a lower bound."""
    module, recorder = nn.Identity(), Recorder(Ring(capacity_nbytes=2**20))

    def trial() -> int:
        start = time.perf_counter_ns()
        for _ in range(TRIALS):
            module(None)
        return time.perf_counter_ns() - start

    plain = min(trial(), trial())
    with ModuleWatch(recorder, HostClock(time.monotonic_ns), every=False) as watch:
        watch.register(module)
        recorded_ns = min(trial(), trial())
    return max(0, recorded_ns - plain) // TRIALS


def _with_model(header: Any, machinery: Machinery) -> Any:
    """A header that knows a streamed model's budgets and links."""
    plan = machinery.plan
    if plan is None:
        return header
    budgets = {"HOST": header.budgets.get("HOST", 0) + plan.host_budget_nbytes}
    if plan.device_budget_nbytes is not None:
        budgets["DEVICE"] = header.budgets.get("DEVICE", 0) + plan.device_budget_nbytes
    peaks = {"DISK_READ": plan.links.disk_read, "H2D": plan.links.h2d, "D2H": plan.links.d2h}
    return msgspec.structs.replace(
        header,
        budgets=budgets,
        peaks={**header.peaks, **{name: rate for name, rate in peaks.items() if rate}},
        emulated=header.emulated or plan.emulated,
    )
