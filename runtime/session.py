"""A streamed model while it runs: leases around forwards, one root call at a time.

The top of the data path, per call of a module that anchors blocks: acquire and bind its blocks, run its own forward,
unbind and release. The outermost such call is the root call: it takes the model's lock and tells the executor.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..memory.arena import AnyArena
from ..memory.errors import ClosedError, ForkError, UsageError
from ..scheduler.executor import WATCH_S, Executor
from ..scheduler.lease import Lease
from .binding import Binding
from .devices.base import Device
from .intercept import absent_class, is_linear, rows_wanted
from .oncpu import OnCpu
from .operands import copy_in_place_of, storage_address, swap, unfolded
from .saved import SavedTensors
from .tables import Table

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, eq=False)
class _Frame:
    """One call of a wrapped module."""

    leases: list[Lease] = field(default_factory=list)
    own: int = 0
    """How many of them the module itself asked for; the others are kept for views that it took."""


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
        self._pretrained = pretrained
        self.device = device
        self.executor = executor
        self.bindings = bindings
        self.tables = tables
        self._homes: dict[int, int | Table] = {id(table.parameter): table for table in tables.values()}
        """By id of each parameter: its block, or the table that serves it."""
        self.arena = device.tensor(front)
        self._base = storage_address(self.arena)
        self._absent_class = absent_class(self)
        for binding in bindings.values():
            for bound in binding.tensors:
                self._homes.setdefault(id(bound.parameter), binding.block)  # pieces of a table stay the table's
                self.vanish(bound.parameter)
        for table in tables.values():
            self.vanish(table.parameter)
        self._saved = SavedTensors(self)
        self._frames: list[_Frame] = []
        self._root = threading.RLock()
        self._owner: int | None = None
        self._contexts: list[AbstractContextManager[Any]] = []
        self.bind_lock = threading.RLock()
        self.returned = threading.Condition(self.bind_lock)
        """Told when the CPU gives weights back."""
        self.on_cpu: OnCpu | None = None  # set where parts of the model are computed from host memory
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
            frame = self._enter(root, blocks)
            failed = True
            try:
                if opaque:
                    with torch._C.DisableTorchFunction():
                        result = inner(*args, **kwargs)
                else:
                    result = inner(*args, **kwargs)
                result = self._without_views(result)
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

    def _enter(self, key: Hashable, blocks: tuple[int, ...]) -> _Frame:
        if not self.running_here():
            self._begin(key)
        elif torch.is_grad_enabled():
            self._refuse_other_hooks()
        frame = _Frame()
        self._frames.append(frame)
        try:
            for block in blocks:
                frame.leases.append(self.lend(block))
            frame.own = len(frame.leases)
        except BaseException:
            self._leave(frame, True)
            raise
        return frame

    def _leave(self, frame: _Frame, failed: bool) -> None:
        assert self._frames[-1] is frame, "frames do not nest"
        try:
            self._release(frame.leases)
        finally:
            self._frames.pop()
            if not self._frames:
                self._end(failed)

    def _release(self, leases: list[Lease]) -> None:
        failure: BaseException | None = None
        while leases:
            try:
                self.take_back(leases.pop())
            except BaseException as error:  # the others must be given back all the same
                failure = error
        if failure is not None:
            raise failure

    def _begin(self, key: Hashable) -> None:
        if os.getpid() != self.pid:
            raise ForkError(
                "a streamed model cannot run in a forked child: its threads and its memory are not there. Load it in "
                "the child, or use the 'spawn' start method"
            )
        while not self._root.acquire(timeout=WATCH_S):
            logger.warning(
                "thread %d waits for its turn: thread %s runs this model. If that one waits for this one (a forward "
                "that calls its submodules in other threads), neither will go on",
                threading.get_ident(),
                self._owner,
            )
        try:
            if self.closed:
                raise ClosedError("the model was closed by penstock.close(); load it again")
            self.executor.begin(key)
            self._owner = threading.get_ident()
            try:
                for context in self._root_contexts():
                    context.__enter__()
                    self._contexts.append(context)
            except BaseException:
                self._leave_contexts()
                self.executor.end(failed=True)
                raise
        except BaseException:
            self._owner = None
            self._root.release()
            raise

    def _refuse_other_hooks(self) -> None:
        """torch applies only the innermost saved-tensor hooks: others than ours would keep views of slots, silently."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if top is None or getattr(top[0], "__self__", None) is not self._saved:
            raise UsageError(
                "saved-tensor hooks inside a streamed model (save_on_cpu, gradient checkpointing) would keep weights "
                "that are about to be replaced, and give wrong gradients: switch them off, or run under torch.no_grad()"
            )

    def _root_contexts(self) -> Iterator[AbstractContextManager[Any]]:
        if torch.is_grad_enabled():
            yield self._saved.hooks()

    def _leave_contexts(self) -> None:
        while self._contexts:
            self._contexts.pop().__exit__(None, None, None)

    def _end(self, failed: bool) -> None:
        try:
            if self.on_cpu is not None:
                self.on_cpu.end_of_call()
            self._leave_contexts()
            self.executor.end(failed=failed)
        finally:
            self._owner = None
            self._root.release()

    def running_here(self) -> bool:
        """Whether the calling thread is inside a root call."""
        return self._owner == threading.get_ident()

    def flagged(self) -> bool:
        """Whether lent weights are to want a gradient, as those of `from_pretrained` do, where none is recorded.

        torch chooses by that flag how it multiplies a strided operand (the last positions of a batch, before the output
        projection): without it the weight is copied once per sequence, and the last bit of the result differs.
        """
        return self._pretrained and not torch.is_grad_enabled()

    # --- leases -----------------------------------------------------------------------------------------------------

    def lend(self, block: int, *, observed: bool = True) -> Lease:
        """Acquire a block and lend its bytes to its parameters; `observed` if it is part of the model's own run."""
        lease = self.executor.acquire(block, observed=observed)
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
                        self.appear(bound.parameter)
                    binding.bind(self.arena, slot, flagged=flagged)
                except BaseException:
                    self._mark_absent(binding)
                    raise
            return lease
        except BaseException:  # an interrupt while the copy was waited for must not cost a slot
            self.executor.release(lease)
            raise

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
            self.executor.release(lease, self.device.computed())

    def appear(self, parameter: nn.Parameter) -> None:
        """Its bytes are there, or about to be: operations use them as they are."""
        parameter.__class__ = nn.Parameter

    def vanish(self, parameter: nn.Parameter) -> None:
        """Its bytes are away: operations that use it are to be caught."""
        parameter.__class__ = self._absent_class

    def _mark_absent(self, binding: Binding) -> None:
        if not binding.uses:
            for bound in binding.tensors:
                self.vanish(bound.parameter)

    # --- stray uses -------------------------------------------------------------------------------------------------

    def call_with(
        self, missing: list[nn.Parameter], func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a torch call that uses parameters which are not there (called by the interception)."""
        for parameter in missing:
            home = self._homes.get(id(parameter))
            if isinstance(home, Table):
                return self._call_table(home, func, args, kwargs)
        leases: list[Lease] = []
        try:
            for block in dict.fromkeys(h for p in missing if isinstance(h := self._homes.get(id(p)), int)):
                leases.append(self.lend(block))
            result = func(*args, **kwargs)
            if self._aliases(result):  # a view was taken: it must stay valid until the module that took it returns
                if self._can_keep(leases):
                    self._frames[-1].leases.extend(leases)
                    leases = []
                else:
                    copies = {id(p): copy_in_place_of(p) for p in missing}
                    result = func(*(swap(v, copies) for v in args), **{k: swap(v, copies) for k, v in kwargs.items()})
            return result
        finally:
            self._release(leases)

    def _can_keep(self, leases: list[Lease]) -> bool:
        """Whether slots are to spare for leases that last longer than a call; slots of resident blocks always are."""
        ring = [lease for lease in leases if not lease.residence.permanent]
        kept = sum(not lease.residence.permanent for frame in self._frames for lease in frame.leases[frame.own :])
        return bool(self._frames) and (not ring or kept + len(ring) <= self._spare_slots)

    def _call_table(self, table: Table, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = rows_wanted(func, args, kwargs)
        if rows is not None:
            return table.lookup(rows, wrap=func is torch.Tensor.__getitem__)
        if is_linear(func):
            x = args[0] if args else kwargs["input"]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if weight is table.parameter and not isinstance(bias, self._absent_class):
                whole_x, x = x, self._folded(x, table.parameter)
                if (self.on_cpu is not None and self.on_cpu.serves(table, x)) or table.splits(x):
                    inside = bias if x is whole_x else None
                    elsewhere = None if self.on_cpu is None else self.on_cpu.product(x, inside)
                    return unfolded(table.product(x, inside, self._lend_piece, elsewhere), whole_x, bias)
        whole = table.whole()
        swapped = [swap(value, {id(table.parameter): whole}) for value in args]
        named = {name: swap(value, {id(table.parameter): whole}) for name, value in kwargs.items()}
        return func(*swapped, **named)  # another table may be among the arguments: torch finds it

    def _folded(self, x: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
        """A strided operand as a matrix, as torch folds it when the weight wants a gradient (see `flagged`)."""
        if x.dim() < 3 or x.is_contiguous() or not (self._pretrained or weight.requires_grad):
            return x
        return x.reshape(-1, x.shape[-1])

    def _lend_piece(self, block: int) -> tuple[torch.Tensor, Callable[[], None]]:
        lease = self.executor.acquire(block)
        try:
            self.device.compute_waits(lease.residence.event)
            binding = self.bindings[block]
            view = binding.views(self.arena, lease.residence.slot)[0].detach()
            view.requires_grad_(binding.tensors[0].parameter.requires_grad)
        except BaseException:
            self.executor.release(lease)
            raise
        return view, lambda: self.executor.release(lease, self.device.computed())

    def _without_views(self, result: Any) -> Any:
        """A module's result with fresh copies in the place of views of its weights, which are about to leave."""
        if isinstance(result, torch.Tensor):
            if isinstance(result, nn.Parameter) or not self._aliases(result):
                return result
            return result.clone()
        if type(result) is tuple or type(result) is list:
            found = [self._without_views(value) for value in result]
            same = all(a is b for a, b in zip(found, result, strict=True))
            return result if same else type(result)(found)
        if isinstance(result, dict):  # transformers' outputs are dicts too
            for key, value in result.items():
                fresh = self._without_views(value)
                if fresh is not value:
                    result[key] = fresh
        return result

    def _aliases(self, result: Any) -> bool:
        """Whether a result shares the arena's memory."""
        values = result if isinstance(result, tuple | list) else (result,)
        return any(isinstance(v, torch.Tensor) and storage_address(v) == self._base for v in values)

    # --- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave placeholders in all parameters; a later call of the model raises `ClosedError`."""
        with self._root:
            self.closed = True
            if self.on_cpu is not None:
                self.on_cpu.close()
            for binding in self.bindings.values():
                binding.restore()
                for bound in binding.tensors:
                    self.appear(bound.parameter)
            for table in self.tables.values():
                self.appear(table.parameter)
            self.arena, self._base = torch.empty(0), -1
