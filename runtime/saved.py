"""Weights that autograd saves for backward, as references instead of views of a slot.

A slot is refilled between forward and backward, and autograd would not notice: the gradient would be wrong without an
error. So a saved view of the arena is packed as (block, place) and fetched again when backward asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .recompute import Pending, Segment

if TYPE_CHECKING:
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


class SavedTensors:
    """Packs and unpacks what autograd saves during a root call."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.generation = 0
        """How often weights have changed, by steps."""
        self._segment: Segment | None = None
        """Whose first forward runs."""
        self._again: Segment | None = None
        """Whose second one does."""
        self._base = session.arena.untyped_storage().data_ptr()

    def hooks(self) -> AbstractContextManager[Any]:
        """The context in which saved tensors are packed."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

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

    @contextmanager
    def within(self, segment: Segment) -> Iterator[None]:
        """Have what is saved made again later."""
        self._segment = segment
        try:
            yield
        finally:
            self._segment = None

    @contextmanager
    def again(self, segment: Segment) -> Iterator[None]:
        """Give what is saved to a segment that runs again."""
        before, self._again = self._again, segment
        try:
            yield
        finally:
            self._again = before

    def _pack(self, tensor: torch.Tensor) -> SavedTensor | _Reference | Pending | None:
        if self._segment is not None:
            return self._segment.hold(tensor)
        packed = self._packed(tensor)
        if self._again is not None:
            self._again.keep(tensor, packed)
            return None  # of a graph that nobody will go back through
        return packed

    def _packed(self, tensor: torch.Tensor) -> SavedTensor | _Reference:
        if tensor.layout is not torch.strided or tensor.untyped_storage().data_ptr() != self._base:
            return SavedTensor(tensor)
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

    def _unpack(self, saved: SavedTensor | _Reference | Pending) -> torch.Tensor:
        if isinstance(saved, Pending):
            saved = saved.segment.take(saved.index)
        assert not isinstance(saved, Pending)
        if isinstance(saved, SavedTensor):
            return saved.unpack()
        self.check(saved.generation)
        session = self._session
        lease = session.executor.acquire(saved.block, backward=True)
        try:
            session.device.compute_waits(lease.residence.event)
            flat = session.arena[lease.residence.slot.offset :].view(saved.dtype)
            at = flat.storage_offset() + saved.offset // flat.element_size()
            return flat.as_strided(saved.shape, saved.stride, at).clone()
        finally:
            session.executor.release(lease, session.device.computed())
