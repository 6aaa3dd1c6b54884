"""Weights that autograd saves for backward, as references instead of views of a slot.

A slot is refilled between forward and backward, and autograd would not notice: the gradient would be wrong without an
error. So a saved view of the arena is packed as (block, place) and fetched again when backward asks for it. Rows of a
table that were gathered for a call lie in memory of their own, which a graph would keep for all layers: they are packed
as (table, rows) and read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .activations.hold import HeldTensor
from .activations.operations import OperationLog
from .activations.replay import Replay
from .recompute import Pending, Segment
from .tables import Table

if TYPE_CHECKING:
    from .activations.keeper import ActivationKeeper, SegmentCall
    from .session import Session


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reference:
    """A view of a block, by where it lies in it."""

    block: int
    offset: int
    """Bytes from the start of the slot."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    generation: int
    """How often weights had changed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """A view of rows of a table that were gathered."""

    table: Table
    start: int
    stop: int
    offset: int
    """Elements from the start of these rows."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The same view of rows that are read again."""
        flat = self.table.rows(self.start, self.stop).view(-1)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.offset)


class _Gather(torch.autograd.Function):
    """Rows of experts, whose gradient is the parameter's. Lookups and pieces of other tables have no history: with what
    is gathered alone a tied table would have a part of its gradient, and nobody would notice."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, table: Table) -> torch.Tensor:
        """[rows, *row] All of them."""
        return table.rows(0, table.parameter.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """What the table's own gradient is."""
        return grad, None


def _weak_reference(storage: torch.UntypedStorage) -> Any:
    """Tells by `expired()` whether memory is gone."""
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


class SavedTensor:
    """A tensor that a graph owns: never the graph's own result, or the graph would own itself and never be freed."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = tensor._version

    def unpack(self) -> torch.Tensor:
        """What was saved.

        Raises:
            RuntimeError: it has been changed since. torch leaves this to us where there are hooks.
        """
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self._tensor.type()} {list(self._tensor.shape)}] is at version {self._tensor._version}; "
                f"expected version {self._version} instead."
            )
        return self._tensor


_Packed = SavedTensor | _Reference | _Rows
"""What a tensor of the model's own is packed as."""


class SavedTensors:
    """Packs and unpacks what autograd saves during a root call."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.generation = 0
        """How often weights have changed, by steps."""
        self.keeper: ActivationKeeper | None = None
        """Decides what leaves memory; None where nothing does."""
        self._segment: Segment | None = None
        """Whose first forward runs."""
        self._call: SegmentCall | None = None
        """What is known of it."""
        self._watching: OperationLog | Replay | None = None
        """What looks at operations, if anything does: not at ours."""
        self._again: Segment | None = None
        """Whose second one does."""
        self._base = session.arena.untyped_storage().data_ptr()
        self._gathered: dict[int, tuple[Any, Table, int]] = {}
        """By address, tables that were gathered and may still be there: what tells that of the memory, the table, and
        where in that memory it begins, in elements."""

    def gathered(self, table: Table) -> torch.Tensor:
        """All experts of a layer for a call that gradients may pass through: read again for backward, and not kept."""
        assert table.of_experts
        if table.parameter.requires_grad:
            whole: torch.Tensor = _Gather.apply(table.parameter, table)  # type: ignore[no-untyped-call]
        else:
            whole = table.whole()
        storage = whole.untyped_storage()
        self._gathered = {at: each for at, each in self._gathered.items() if not each[0].expired()}
        self._gathered[storage.data_ptr()] = _weak_reference(storage), table, int(whole.storage_offset())
        return whole

    def _rows(self, tensor: torch.Tensor) -> _Rows | None:
        """What a view of a gathered table is packed as."""
        if tensor.layout is not torch.strided or not tensor.numel():
            return None
        known = self._gathered.get(tensor.untyped_storage().data_ptr())
        if known is None or known[0].expired() or tensor.dtype is not known[1].parameter.dtype:
            return None
        _, table, begin = known
        each = prod(table.parameter.shape[1:])
        at = int(tensor.storage_offset()) - begin
        last = at + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        start = at // each
        return _Rows(
            table=table,
            start=start,
            stop=last // each + 1,
            offset=at - start * each,
            shape=tuple(tensor.shape),
            stride=tuple(tensor.stride()),
        )

    def hooks(self) -> AbstractContextManager[Any]:
        """The context in which saved tensors are packed."""
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        if self.keeper is None:
            return hooks
        around = ExitStack()
        around.enter_context(self.keeper.forward())
        around.enter_context(hooks)
        return around

    def check(self, generation: int) -> None:
        """See that weights are those that a forward had.

        Raises:
            RuntimeError: a step has changed them since. torch would say as much of tensors in memory.
        """
        if generation != self.generation:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified: backward goes through a graph "
                "that was made before optimizer.step(), and weights have changed since. Run backward before step(), or "
                "the forward again"
            )

    @property
    def in_segment(self) -> bool:
        """Whether a segment is running, for the first or the second time."""
        return self._segment is not None or self._again is not None

    @property
    def runs_again(self) -> bool:
        """Whether a segment is running for the second time: with what it had for the first."""
        return self._again is not None

    @contextmanager
    def unnoticed(self) -> Iterator[None]:
        """Do something that is no part of the forward."""
        mode = self._watching
        if mode is None:
            yield
            return
        before, mode.paused = mode.paused, True
        try:
            yield
        finally:
            mode.paused = before

    @contextmanager
    def within(self, segment: Segment, call: SegmentCall | None = None) -> Iterator[None]:
        """Have what is saved made again later, but for what the plan has held."""
        self._segment, self._call = segment, call
        try:
            with self.noticed(None if call is None else call.log):
                yield
        finally:
            self._segment = self._call = None

    @contextmanager
    def watched(self, replay: Replay) -> Iterator[None]:
        """Have operations go through a replay."""
        with replay, self.noticed(replay):
            yield

    @contextmanager
    def noticed(self, mode: OperationLog | Replay | None) -> Iterator[None]:
        """Tell what looks at operations when they are ours, and no part of the forward."""
        before, self._watching = self._watching, mode
        try:
            yield
        finally:
            self._watching = before

    @contextmanager
    def again(self, segment: Segment) -> Iterator[None]:
        """Give what is saved to a segment that runs again."""
        before, self._again = self._again, segment
        try:
            yield
        finally:
            self._again = before

    def _pack(self, tensor: torch.Tensor) -> _Packed | Pending | HeldTensor | None:
        mode = self._watching
        if mode is None:
            return self._packed_in_turn(tensor)
        mode.paused = True
        try:
            return self._packed_in_turn(tensor)
        finally:
            mode.paused = False

    def _packed_in_turn(self, tensor: torch.Tensor) -> _Packed | Pending | HeldTensor | None:
        if self._segment is not None:
            log = None if self._call is None else self._call.log
            return self._segment.hold(tensor, self._held(tensor), log)  # type: ignore[no-any-return]
        if self._again is not None:
            self._again.keep(tensor, self._packed(tensor))
            return None  # of a graph that nobody will go back through
        keeper = self.keeper
        if keeper is not None and not keeper.machine.again:
            held = keeper.outside(tensor) if keeper.call is None else keeper.call.take(tensor)
            if held is not None:
                return held
        return self._packed(tensor)

    def _held(self, tensor: torch.Tensor) -> _Packed | HeldTensor | None:
        """What a segment's tensor is packed as; None where it is made again."""
        call, keeper = self._call, self.keeper
        if call is None or keeper is None:
            return None
        if call.stays(tensor) or not keeper.movable(tensor):  # it is there all the same
            return self._packed(tensor) if call.decides else None
        return call.take(tensor)

    def is_lent(self, tensor: torch.Tensor) -> bool:
        """Whether it is a view of a slot."""
        return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() == self._base

    def held(self, tensor: HeldTensor) -> torch.Tensor:
        """One that the keeper has."""
        assert self.keeper is not None
        return self.keeper.tensor(tensor)

    def _packed(self, tensor: torch.Tensor) -> _Packed:
        if not self.is_lent(tensor):
            return (self._rows(tensor) if self._gathered else None) or SavedTensor(tensor)
        at = tensor.storage_offset() * tensor.element_size()
        for binding in self._session.bindings.values():
            slot = binding.slot
            if slot is not None and slot.offset <= at < slot.offset + slot.nbytes:
                return _Reference(
                    block=binding.block,
                    offset=int(at) - slot.offset,
                    dtype=tensor.dtype,
                    shape=tuple(tensor.shape),
                    stride=tuple(tensor.stride()),
                    generation=self.generation,
                )
        return SavedTensor(tensor.detach().clone())  # a piece of a table: leased without a binding

    def _unpack(self, saved: _Packed | Pending | HeldTensor) -> torch.Tensor:
        if isinstance(saved, Pending):
            saved = saved.segment.take(saved.index)
        assert not isinstance(saved, Pending)
        if isinstance(saved, HeldTensor):
            return self.held(saved)
        if isinstance(saved, SavedTensor):
            return saved.unpack()
        if isinstance(saved, _Rows):
            return saved.read()
        self.check(saved.generation)
        session = self._session
        lease = session.executor.acquire(saved.block, backward=True)
        try:
            session.device.compute_waits(lease.residence.event)
            flat = session.arena[lease.residence.slot.offset :].view(saved.dtype)
            at = flat.storage_offset() + saved.offset // flat.element_size()
            view = flat.as_strided(saved.shape, saved.stride, at)
            if lease.residence.permanent and not session.device.separate:
                return view  # it changes by an update alone, and none of this block begins while its user computes
            return view.clone()
        finally:
            session.executor.release(lease, session.device.computed())
