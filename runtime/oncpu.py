"""Parts of a model that the CPU computes from host memory, while the rest runs on the device.

    call of a unit with few rows ── lease the host's copies ── bind ── arguments to the host ── its own forward
        ── result to the device ── unbind ── release

Nothing of this counts as an access of the device's: no block is copied for it, and none is brought ahead of the next
token. A call with many rows leases the same blocks in the device's ring, as if there were no unit. So a prompt is
computed by the device and the tokens after it by the CPU.

A member of a sweep gives the device to another one meanwhile (`sweep.py`), so that both processors work.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..kernels.linear_rows import linear_piece
from ..memory.arena import AnyArena
from ..memory.errors import ReadOnlyWeightError
from ..scheduler.executor import WATCH_S
from ..scheduler.lease import Lease
from . import caches
from .arguments import Bundle, portable, rows_of, rows_of_root
from .binding import version_of
from .crossing import Twins, crossing_of
from .guess import Root
from .tables import Piece, Table
from .units import Unit, Units

if TYPE_CHECKING:
    from .session import Session

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]


@dataclass(kw_only=True, eq=False)
class _State:
    """Who runs a unit now. It is lent to one processor at a time."""

    on_cpu: int = 0
    on_device: int = 0
    small: list[tuple[nn.Parameter, torch.Tensor, int]] = field(default_factory=list)
    """Small tensors lent from the host: parameter, its value on the device, its version since."""
    buffers: list[tuple[nn.Module, str, torch.Tensor, torch.Tensor, int]] = field(default_factory=list)
    """The same of buffers: module, name, the device's, the host's, the version of that."""


class OnCpu:
    """Runs the units of one model.

    Args:
        session: Of the model.
        host: The arena of the host tier.
    """

    def __init__(self, session: Session, units: Units, host: AnyArena) -> None:
        self._session = session
        self._units = units
        self._host = session.device.tensor(host)
        self._crossing = crossing_of(session.device)
        self._twins = Twins()
        self._twins_of: dict[int, Twins] = {}
        """Those of the members of a sweep, by thread: they compute at the same time."""
        self._buffers = Twins()
        """Of buffers, which stay."""
        self._small: dict[int, torch.Tensor] = {}
        """Copies of small tensors, by id of the parameter."""
        self._states = {unit.path: _State() for unit in units.units}
        self._inside: set[int] = set()
        """Threads that compute a unit on the CPU."""
        self._thresholds = sorted(set(units.on_cpu.values()))
        self._all = frozenset(units.on_cpu)
        self._refused: set[str] = set()
        self.computed = 0
        """Calls of units, and pieces of tables, computed on the CPU so far."""

    # --- wiring -----------------------------------------------------------------------------------------------------

    def install(self, module: nn.Module, keys: Mapping[str, int]) -> None:
        """Let units decide, call by call, where they are computed. Their forwards are the session's by now.

        Args:
            module: The model.
            keys: Of its modules, by path, as the session has them.
        """
        for unit in self._units.units:
            self._wrap(unit, module.get_submodule(unit.path), keys[unit.path])

    def _wrap(self, unit: Unit, module: nn.Module, key: int) -> None:
        streamed: Forward = module.__dict__["forward"]
        inner: Forward = streamed.__wrapped__  # type: ignore[attr-defined]
        state = self._states[unit.path]

        @wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.inside():
                return inner(*args, **kwargs)
            if not module.training and self._takes(unit, args, kwargs):
                with self._session.call(self.root(key, args, kwargs)):
                    done, result = self._run(unit, module, inner, args, kwargs)
                if done:
                    return result
            with self._device_runs(unit, state, args, kwargs):
                return streamed(*args, **kwargs)

        module.__dict__["forward"] = forward

    def inside(self) -> bool:
        """Whether the calling thread computes a unit on the CPU: what is called there leases nothing."""
        return threading.get_ident() in self._inside

    def root(self, key: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        """What the executor is to know a root call by, so that the order of few rows is apart from that of many."""
        sweep = self._session.sweep_here()
        part = self._all if sweep is None else sweep.on_cpu
        if not part:
            return key
        rows = rows_of_root(args, kwargs)
        under = None if rows is None else next((each for each in self._thresholds if rows < each), None)
        return key if under is None else Root(key, under, None if part == self._all else part)

    def end_of_call(self) -> None:
        """The root call of this thread ended."""
        self._own_twins().end_of_call()

    def end_of_sweeps(self) -> None:
        """Nobody is a member of a sweep any more."""
        self._twins_of.clear()

    def _own_twins(self) -> Twins:
        if self._session.sweep_here() is None:
            return self._twins
        return self._twins_of.setdefault(threading.get_ident(), Twins())

    def close(self) -> None:
        """Let go of everything."""
        self._twins.clear()
        self._twins_of.clear()
        self._buffers.clear()
        self._small.clear()
        self._host = torch.empty(0)

    # --- the decision -----------------------------------------------------------------------------------------------

    def _takes(self, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the CPU is to compute this call."""
        rows = rows_of(args, kwargs)
        if rows is None or rows >= unit.rows_below or not self._allowed(unit.blocks[0]):
            return False
        stranger = next((v for v in (*args, *kwargs.values()) if not portable(v, unit.layers)), None)
        if stranger is not None and unit.path not in self._refused:
            self._refused.add(unit.path)
            logger.warning(
                "%s is computed on the device after all: it is given a %s, of which it is not known how to move it",
                unit.path,
                type(stranger).__name__,
            )
        return stranger is None

    def _allowed(self, block: int) -> bool:
        sweep = self._session.sweep_here()
        if sweep is not None and block not in sweep.on_cpu:  # many members share one copy of it
            return False
        kind = self._session.device.torch_device.type
        return not torch.is_grad_enabled() and (kind == "cpu" or not torch.is_autocast_enabled(kind))

    # --- on the device ----------------------------------------------------------------------------------------------

    @contextmanager
    def _device_runs(self, unit: Unit, state: _State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """While it does, keys and values are there, and the CPU does not begin."""
        sweep = self._session.sweep_here()
        apart = sweep is not None and unit.blocks[0] in sweep.on_cpu and self._session.running_here()
        with sweep.inside(unit.path, unit.blocks) if sweep is not None and apart else nullcontext():
            returned = self._session.returned
            with returned:
                while state.on_cpu:
                    if not returned.wait(WATCH_S):
                        logger.warning("%s waits for the device: the CPU is still computing it", unit.path)
                state.on_device += 1
            try:
                for value in (*args, *kwargs.values()):
                    if caches.is_cache(value) and caches.can_move(value, unit.layers):
                        caches.move(value, unit.layers, self._to_device)
                yield
            finally:
                with returned:
                    state.on_device -= 1

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        device = self._session.device.torch_device
        return tensor if tensor.device.type == device.type else self._crossing.to_device([tensor])[0]

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.device.type == "cpu" else self._crossing.to_host([tensor])[0]

    # --- on the CPU -------------------------------------------------------------------------------------------------

    def _run(
        self, unit: Unit, module: nn.Module, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[bool, Any]:
        """Compute a call on the CPU, unless the device has the unit at this moment. Whether it was done; the result."""
        executor = self._session.executor
        for value in (*args, *kwargs.values()):
            if caches.is_cache(value):
                caches.move(value, unit.layers, self._to_host)
        bundle = Bundle(self._crossing, self._own_twins())
        bundle.leave(args, kwargs)  # before others of a sweep give the device more to do
        leases: list[Lease] = []
        with self._away(unit.path, unit.blocks):
            try:
                for block in unit.blocks:
                    leases.append(executor.acquire_host(block))
                if not self._lend(unit, module, leases):
                    return False, None
                try:
                    return True, self._compute(bundle, inner, args, kwargs)
                finally:
                    self._take_back(unit)
            finally:
                for lease in leases:
                    executor.release(lease)

    def _away(self, part: str | None, blocks: Sequence[int]) -> AbstractContextManager[None]:
        """Others of the sweep go on on the device meanwhile, where there are any."""
        sweep = self._session.sweep_here()
        return nullcontext() if sweep is None else sweep.away(part, blocks)

    def _compute(self, bundle: Bundle, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = bundle.arrive(args, kwargs, self._session.device.torch_device)
        ident = threading.get_ident()
        self._inside.add(ident)
        try:
            result = inner(*args, **kwargs)
        finally:
            self._inside.discard(ident)
        self.computed += 1
        return bundle.to_device(result)

    def _lend(self, unit: Unit, module: nn.Module, leases: list[Lease]) -> bool:
        """Bind the host's copies to the unit's parameters; not while something on the device has them."""
        session, state = self._session, self._states[unit.path]
        with session.bind_lock:
            bindings = [session.bindings[block] for block in unit.blocks]
            if state.on_device or any(binding.uses and not binding.on_cpu for binding in bindings):
                return False
            bound = 0
            try:
                for binding, lease in zip(bindings, leases, strict=True):
                    lease.residence.slot.check_stamp(binding.block)
                    for each in binding.tensors:
                        session.appear(each.parameter)
                    binding.bind(self._host, lease.residence.slot, flagged=session.flagged(), host=True)
                    bound += 1
                if not state.on_cpu:
                    self._lend_small(unit, module, state)
            except BaseException:
                if not state.on_cpu:
                    self._restore(state)
                self._unbind(unit, bound)
                raise
            state.on_cpu += 1
            return True

    def _lend_small(self, unit: Unit, module: nn.Module, state: _State) -> None:
        for parameter in unit.small:
            if id(parameter) not in self._small:
                (self._small[id(parameter)],) = self._crossing.to_host([parameter])
            value = parameter.data
            parameter.data = self._small[id(parameter)]
            state.small.append((parameter, value, version_of(parameter)))
        for child in module.modules():
            for name, buffer in child._buffers.items():
                if buffer is not None and self._crossing.away(buffer):
                    copy = self._buffers.find(buffer)
                    if copy is None:
                        (copy,) = self._crossing.to_host([buffer])
                        self._buffers.add(buffer, copy)
                    child._buffers[name] = copy
                    state.buffers.append((child, name, buffer, copy, copy._version))

    def _take_back(self, unit: Unit) -> None:
        """Leave parameters and buffers as the device knows them.

        Raises:
            ReadOnlyWeightError: a parameter was changed in place.
        """
        state = self._states[unit.path]
        with self._session.returned:
            state.on_cpu -= 1
            changed = False
            try:
                if not state.on_cpu:
                    changed = self._restore(state)
            finally:
                self._unbind(unit, len(unit.blocks))
                self._session.returned.notify_all()
        if changed:
            raise ReadOnlyWeightError(
                f"a parameter of {unit.path} was changed in place while it was only lent for reading: the change is "
                f"lost. Change it before offloading, or train with penstock.prepare"
            )

    def _restore(self, state: _State) -> bool:
        """Small tensors and buffers of the device's in their places; whether a small one was changed."""
        changed = False
        while state.small:
            parameter, value, version = state.small.pop()
            if version_of(parameter) != version:
                changed = True
                del self._small[id(parameter)]
            parameter.data = value
        while state.buffers:
            child, name, buffer, copy, version = state.buffers.pop()
            now = child._buffers[name]
            if now is not None and now is not copy:  # replaced by another one
                buffer = self._to_device(now)
            elif copy._version != version:
                buffer.copy_(copy)
            child._buffers[name] = buffer
        return changed

    def _unbind(self, unit: Unit, count: int) -> None:
        session = self._session
        failure: BaseException | None = None
        for block in unit.blocks[:count]:
            binding = session.bindings[block]
            try:
                binding.unbind()
            except ReadOnlyWeightError as error:  # the others must be given back all the same
                failure = error
        for block in unit.blocks:
            binding = session.bindings[block]
            if not binding.uses:
                for each in binding.tensors:
                    session.vanish(each.parameter)
        if failure is not None:
            raise failure

    # --- pieces of tables -------------------------------------------------------------------------------------------

    def serves(self, table: Table, x: torch.Tensor) -> bool:
        """Whether all pieces of a product are computed on a CPU that is another processor than the one of x: no bits
        are kept then, and none need to be."""
        return (
            x.device.type != "cpu" and bool(table.pieces) and all(self._piece_here(piece, x) for piece in table.pieces)
        )

    def _piece_here(self, piece: Piece, x: torch.Tensor) -> bool:
        rows = x.numel() // max(x.shape[-1], 1)
        return rows < self._units.pieces.get(piece.block, 0) and self._allowed(piece.block)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> Callable[[Piece], torch.Tensor | None]:
        """What computes pieces of x Wᵀ + b [..., rows of the piece] on the CPU; it gives None for those it does not."""
        here: list[torch.Tensor] = []

        def compute(piece: Piece) -> torch.Tensor | None:
            if not self._piece_here(piece, x):
                return None
            if not here:
                here.extend(self._crossing.to_host([x] if bias is None else [x, bias]))
            with self._away(None, (piece.block,)):
                return self._piece(piece, here[0], here[1] if bias is not None else None)

        return compute

    def _piece(self, piece: Piece, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        executor = self._session.executor
        lease = executor.acquire_host(piece.block)
        try:
            lease.residence.slot.check_stamp(piece.block)
            binding = self._session.bindings[piece.block]
            weight = binding.views(self._host, lease.residence.slot, host=True)[0].detach()
            weight.requires_grad_(binding.tensors[0].parameter.requires_grad)
            part = linear_piece(x, weight, bias, piece.start, None)
        finally:
            executor.release(lease)
        self.computed += 1
        return self._crossing.to_device([part])[0]
