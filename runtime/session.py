"""A streamed model while it runs: leases around forwards, one root call at a time.

The top of the data path, per call of a module that anchors blocks: acquire and bind its blocks, run its own forward,
unbind and release. The outermost such call is the root call: it takes the model's lock and tells the executor. Several
root calls may go on together as members of a sweep (`sweep.py`), of which one at a time has the device.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..memory.arena import AnyArena, Slot
from ..memory.errors import ClosedError, ForkError, UsageError
from ..scheduler.executor import WATCH_S, Executor
from ..scheduler.lease import Lease
from ..scheduler.mover import Event
from .arrears import Arrears
from .binding import Binding
from .calls import Frame, RootCall
from .devices.base import Device
from .experts.runner import ExpertRunner
from .intercept import absent_class
from .oncpu import OnCpu
from .operands import storage_address
from .saved import SavedTensors
from .stray import StrayUses
from .sweep import Sweep
from .tables import Table
from .views import without_views

logger = logging.getLogger(__name__)


class Session:
    """Runs one model.

    Args:
        front: The arena that modules compute from.
        bindings: By block.
        tables: By id of the parameter.
        pretrained: Whether the weights are a checkpoint's, rather than those of a module that was built already.
        spare_slots: Ring slots that leases may hold beyond the forward of the module that anchors them.
    """

    def __init__(
        self,
        *,
        device: Device,
        executor: Executor,
        front: AnyArena,
        bindings: Mapping[int, Binding],
        tables: Mapping[int, Table],
        spare_slots: int,
        pretrained: bool,
    ) -> None:
        self._spare_slots = spare_slots
        self.pretrained = pretrained
        self.device = device
        self.executor = executor
        self.bindings = bindings
        self.tables = tables
        self.arena = device.tensor(front)
        self.base = storage_address(self.arena)
        """Of the arena: whatever begins there is a view of a slot."""
        self.absent_class = absent_class(self)
        """Of parameters whose bytes are away."""
        for binding in bindings.values():
            for bound in binding.tensors:
                self.vanish(bound.parameter)
        for table in tables.values():
            self.vanish(table.parameter)
        self.stray = StrayUses(self)
        self.saved = SavedTensors(self)
        self._root = threading.RLock()
        self._runs: dict[int, RootCall] = {}
        """Root calls by thread: one, or those of the members of a sweep."""
        self._sweep: Sweep | None = None
        self.bind_lock = threading.RLock()
        self.returned = threading.Condition(self.bind_lock)
        """Told when the CPU gives weights back."""
        self.on_cpu: OnCpu | None = None  # set where parts of the model are computed from host memory
        self.experts: ExpertRunner | None = None  # set where experts are blocks of their own
        self.arrears: Arrears | None = None  # set where parts of weights may be behind their steps
        self.pid = os.getpid()
        self.closed = False

    # --- around a module's forward ----------------------------------------------------------------------------------

    def wrap(self, module: nn.Module, key: int, blocks: tuple[int, ...], *, opaque: bool) -> None:
        """Lease `blocks` around every call of the module's forward.

        `opaque` modules choose another kernel for weights with a `__torch_function__`: it is switched off inside.
        """
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            elsewhere = self.on_cpu
            if elsewhere is not None and elsewhere.inside():
                return inner(*args, **kwargs)
            root = key if elsewhere is None or self.running_here() else elsewhere.root(key, args, kwargs)
            if self.experts is not None and not self.running_here():
                self.experts.begin_call(args, kwargs)
            frame = self._enter(root, blocks)
            failed = True
            try:
                if opaque:
                    with torch._C.DisableTorchFunction():
                        result = inner(*args, **kwargs)
                else:
                    result = inner(*args, **kwargs)
                result = without_views(result, self.base)
                failed = False
                return result
            finally:
                self._leave(frame, failed)

        module.__dict__["forward"] = forward  # a module may refuse attributes it does not know

    @contextmanager
    def call(self, key: Hashable) -> Iterator[None]:
        """A call of a module that leases nothing, within a root call or as one."""
        frame = self._enter(key, ())
        failed = True
        try:
            yield
            failed = False
        finally:
            self._leave(frame, failed)

    def _enter(self, key: Hashable, blocks: tuple[int, ...]) -> Frame:
        if not self.running_here():
            self._begin(key)
        elif torch.is_grad_enabled():
            self._refuse_other_hooks()
        frame = Frame()
        self._frames().append(frame)
        try:
            for block in blocks:
                frame.leases.append(self.lend(block))
            frame.own = len(frame.leases)
        except BaseException:
            self._leave(frame, True)
            raise
        return frame

    def _leave(self, frame: Frame, failed: bool) -> None:
        frames = self._frames()
        assert frames[-1] is frame, "frames do not nest"
        try:
            self.release(frame.leases)
        finally:
            frames.pop()
            if not frames:
                self._end(failed)

    def _frames(self) -> list[Frame]:
        """The calls under way in the root call of this thread."""
        return self._runs[threading.get_ident()].frames

    def _begin(self, key: Hashable) -> None:
        if os.getpid() != self.pid:
            raise ForkError(
                "a streamed model cannot run in a forked child: its threads and its memory are not there. Load it in "
                "the child, or use the 'spawn' start method"
            )
        sweep = self.sweep_here()
        if sweep is not None:
            sweep.begin(key)
        else:
            self._lock()
            try:
                self.executor.begin(key)
            except BaseException:
                self._root.release()
                raise
        self._runs[threading.get_ident()] = run = RootCall(sweep=sweep)
        try:
            if torch.is_grad_enabled():
                hooks = self.saved.hooks()
                hooks.__enter__()
                run.contexts.append(hooks)
        except BaseException:
            self._end(True)
            raise

    def _lock(self) -> None:
        """Wait until nobody else runs this model.

        Raises:
            ClosedError: it was closed.
        """
        while not self._root.acquire(timeout=WATCH_S):
            logger.warning(
                "thread %d waits for its turn: thread %s runs this model. If that one waits for this one (a forward "
                "that calls its submodules in other threads), neither will go on",
                threading.get_ident(),
                next(iter(list(self._runs)), None),
            )
        if self.closed:
            self._root.release()
            raise ClosedError("the model was closed by penstock.close(); load it again")

    @contextmanager
    def alone(self, sweep: Sweep | None = None) -> Iterator[None]:
        """Keep the model from all other threads, except the members of a sweep, while the context lasts.

        Raises:
            ClosedError: it was closed.
        """
        self._lock()
        self._sweep = sweep
        try:
            yield
        finally:
            self._sweep = None
            if self.on_cpu is not None:
                self.on_cpu.end_of_sweeps()
            self._root.release()

    def _refuse_other_hooks(self) -> None:
        """torch applies only the innermost saved-tensor hooks: others than ours would keep views of slots, silently."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if top is None or getattr(top[0], "__self__", None) is not self.saved:
            raise UsageError(
                "saved-tensor hooks inside a streamed model (save_on_cpu, gradient checkpointing) would keep weights "
                "that are about to be replaced, and give wrong gradients: switch them off (in training, "
                'penstock.prepare(…, activations="recompute") does what checkpointing does), or run under '
                "torch.no_grad()"
            )

    def _end(self, failed: bool) -> None:
        run = self._runs[threading.get_ident()]
        try:
            if self.on_cpu is not None:
                self.on_cpu.end_of_call()
            while run.contexts:
                run.contexts.pop().__exit__(None, None, None)
            (self.executor if run.sweep is None else run.sweep).end(failed=failed)
        finally:
            del self._runs[threading.get_ident()]
            if run.sweep is None:
                self._root.release()

    def sweep_here(self) -> Sweep | None:
        """The sweep of which the calling thread is a member."""
        sweep = self._sweep
        return sweep if sweep is not None and sweep.takes_part() else None

    @property
    def in_sweep(self) -> bool:
        """Whether calls go on together."""
        return self._sweep is not None

    def running_here(self) -> bool:
        """Whether the calling thread is inside a root call."""
        return threading.get_ident() in self._runs

    def flagged(self) -> bool:
        """Whether lent weights are to want a gradient, as those of `from_pretrained` do, where none is recorded.

        torch chooses by that flag how it multiplies a strided operand (the last positions of a batch, before the output
        projection): without it the weight is copied once per sequence, and the last bit of the result differs.
        """
        return self.pretrained and not torch.is_grad_enabled()

    # --- leases -----------------------------------------------------------------------------------------------------

    def lend(self, block: int, *, observed: bool = True) -> Lease:
        """Acquire a block and lend its bytes to its parameters; `observed` if it is part of the model's own run."""
        lease = self.acquire(block, observed=observed)
        try:
            self.device.compute_waits(lease.residence.event)
            binding = self.bindings[block]
            slot = lease.residence.slot
            slot.check_stamp(block)
            flagged = observed and self.flagged()
            with self.returned:
                while binding.on_cpu:
                    self.returned.wait()
                try:
                    for bound in binding.tensors:
                        if self.arrears is None or not self.arrears.behind(bound.parameter):
                            self.appear(bound.parameter)
                        else:  # a copy of it may have been gathered: what it is lent now is no copy
                            self.vanish(bound.parameter)
                    binding.bind(self.arena, slot, flagged=flagged)
                except BaseException:
                    self._mark_absent(binding)
                    raise
            return lease
        except BaseException:  # an interrupt while the copy was waited for must not cost a slot
            self.give_back(lease, None)
            raise

    def acquire(self, block: int, *, observed: bool = True) -> Lease:
        """A lease, of the sweep's where this is part of one."""
        run = self._runs.get(threading.get_ident())
        if not observed or run is None or run.sweep is None:
            return self.executor.acquire(block, observed=observed)
        return run.sweep.acquire(block)

    def give_back(self, lease: Lease, event: Event) -> None:
        """The end of such a lease; what used the block is done with `event`."""
        giver = self.executor if self._sweep is None else self._sweep
        giver.release(lease, event)

    def take_back(self, lease: Lease) -> None:
        """Leave placeholders and release the block after what the compute stream holds now."""
        binding = self.bindings[lease.block]
        try:
            with self.bind_lock:
                try:
                    binding.unbind()
                finally:
                    self._mark_absent(binding)
        finally:
            self.give_back(lease, self.device.computed())

    def release(self, leases: list[Lease]) -> None:
        """Take all of them back, the last one first, whatever fails with one."""
        failure: BaseException | None = None
        while leases:
            try:
                self.take_back(leases.pop())
            except BaseException as error:  # the others must be given back all the same
                failure = error
        if failure is not None:
            raise failure

    def keep(self, leases: list[Lease]) -> bool:
        """Hold leases until the calling module returns, if slots are to spare; those of blocks that stay always are."""
        run = self._runs.get(threading.get_ident())
        if run is None or not run.frames:
            return False
        ring = [lease for lease in leases if not lease.residence.permanent]
        kept = sum(not lease.residence.permanent for frame in run.frames for lease in frame.leases[frame.own :])
        spare = self._spare_slots if run.sweep is None else 0  # each member would take its own
        if ring and kept + len(ring) > spare:
            return False
        run.frames[-1].leases.extend(leases)
        return True

    def appear(self, parameter: nn.Parameter) -> None:
        """Its bytes are there, or about to be: operations use them as they are."""
        parameter.__class__ = nn.Parameter

    def vanish(self, parameter: nn.Parameter) -> None:
        """Its bytes are away: operations that use it are to be caught."""
        parameter.__class__ = self.absent_class

    def _mark_absent(self, binding: Binding) -> None:
        if not binding.uses:
            for bound in binding.tensors:
                self.vanish(bound.parameter)

    def bring_up_to_date(self, block: int, slot: Slot | None = None) -> None:
        """Have all steps made that parts of a leased block are behind: somebody looks at it who may look at any.

        Args:
            block: The block.
            slot: Where it is leased; None where it is lent to its parameters.
        """
        if self.arrears is None:
            return
        binding = self.bindings[block]
        at = slot or binding.slot
        assert at is not None, f"block {block} is not lent"
        self.arrears.settle(block, at)
        if binding.uses:
            for bound in binding.tensors:
                self.appear(bound.parameter)

    # --- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave placeholders in all parameters; a later call of the model raises `ClosedError`."""
        with self._root:
            self.closed = True
            if self.on_cpu is not None:
                self.on_cpu.close()
            if self.experts is not None:
                self.experts.close()
            for binding in self.bindings.values():
                binding.restore()
                for bound in binding.tensors:
                    self.appear(bound.parameter)
            for table in self.tables.values():
                self.appear(table.parameter)
            self.arena, self.base = torch.empty(0), -1
