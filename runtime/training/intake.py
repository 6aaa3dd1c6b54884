"""Where a gradient goes when it has been made: to a place of its own, into a sum, to disk, or into its update."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...kernels.accumulation import accumulate
from ...kernels.norms import gradient_norm
from ...kernels.scratch import Scratch
from .departures import Departures, Work
from .gradientroom import GradientPool, GradientRoom, WideGradient
from .spill import GradientSpill
from .trained import Trained


@dataclass(frozen=True, kw_only=True, eq=False)
class SpilledGradient:
    """A gradient that is on disk."""

    elements: int


Gradient = torch.Tensor | SpilledGradient
"""Of one step: flat and in host memory, or on disk."""


class GradientIntake:
    """Takes gradients in: at once, or, from a device apart, on a thread of `departures` while backward goes on.

    What it gives of one that has left a device may not be there yet: `wait`, or `settle`, comes before it is read.
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        scratch: Scratch,
        *,
        most: int = 1,
        room: GradientRoom | None = None,
        spill: GradientSpill | None = None,
        pool: GradientPool | None = None,
        departures: Departures | None = None,
    ) -> None:
        """Nothing has come.

        Args:
            trained: Whose.
            scratch: Of the thread in which they are taken in: that of backward, or of `departures`.
            most: Backward passes of a step.
            room: Places of those that stay; None to keep them where autograd put them, which needs one memory for all.
            spill: Where those go that do not stay.
            pool: Places of these where they are whole and go to updates that backward begins; None for memory of their
                own, which likewise needs one memory for all.
            departures: From a device apart.
        """
        self.room, self.spill, self.pool = room, spill, pool
        self.wide = WideGradient(max(each.elements for each in trained))
        self.on_full: Callable[[], None] | None = None
        """Called where a gradient finds no place in the pool: has one given back."""
        self.early = False
        """Whether those that are whole go to updates that backward begins, from memory."""
        self._most = most
        self._scratch = scratch
        self._departures = departures
        self._norms: dict[int, torch.Tensor] = {}
        """Of whole gradients in fp32, 0-dim, as far as they were taken on the way."""
        self._waited_s = 0.0
        """For drives, at the end of a step and where one makes room."""

    def leaves(self, index: int) -> bool:
        """Whether the gradient of a parameter has no place of its own in memory."""
        return self.spill is not None and index in self.spill

    @property
    def departs(self) -> bool:
        """Whether they are made on a device apart."""
        return self._departures is not None

    # --- called by backward -------------------------------------------------------------------------------------------

    def take_in(self, index: int, flat: torch.Tensor, kept: Gradient | None, *, whole: bool) -> Gradient:
        """One more of a parameter, flat.

        Args:
            index: Whose.
            flat: It.
            kept: What came of the passes before.
            whole: Whether no other pass will come.

        Returns:
            What there is of it from now on.

        Raises:
            Exception: it, or one before it, cannot be brought to where it is to be.
        """
        first = kept is None
        if self.departs and first and whole:  # else of the sum, when there is one
            self._norms[index] = gradient_norm(flat.float())
        if self.leaves(index):
            if whole and self.early:
                return self._bring(index, flat, first=first)
            self._carry(index, flat, lambda host: self._send(index, host, first=first, whole=whole))
            return SpilledGradient(elements=len(flat))
        if first:
            place = None if self.room is None else self.room.place(index)
            return flat if place is None else self._put(index, flat, place, whole=whole)
        assert isinstance(kept, torch.Tensor)
        total = kept.to(torch.float32)  # itself, where it has a place
        self._carry(index, flat, lambda host: self._add_to(index, total, host, first=False, whole=whole))
        return total

    def _carry(self, index: int, flat: torch.Tensor, work: Work) -> None:
        """Have something done with a gradient, in host memory."""
        if self._departures is None:
            work(flat)
        else:
            self._departures.through(index, flat, work)

    def _put(self, index: int, flat: torch.Tensor, place: torch.Tensor, *, whole: bool) -> torch.Tensor:
        """Copy the first one to its place."""
        if self._departures is None:
            return place.copy_(flat)
        if place.dtype == flat.dtype:
            self._departures.send(index, flat, place)
        else:
            self._departures.through(
                index, flat, lambda host: self._add_to(index, place, host, first=True, whole=whole)
            )
        return place

    def _add_to(self, index: int, total: torch.Tensor, flat: torch.Tensor, *, first: bool, whole: bool) -> None:
        accumulate(total, flat, first=first, scratch=self._scratch)
        if whole and self.departs and index not in self._norms:  # else `norm` takes it, where backward does not wait
            self._norms[index] = gradient_norm(total)

    def _send(self, index: int, flat: torch.Tensor, *, first: bool, whole: bool) -> None:
        """Send one to disk, with what has come of it before. The norm is taken here, while it is in memory."""
        assert self.spill is not None
        if first and self._most > 1:
            flat = self.wide.of(flat)  # as what is kept in memory is, where several passes may come
        if not first:
            total = self.wide.room(len(flat))
            self.spill.load(index, total)
            accumulate(total, flat, first=False, scratch=self._scratch)
            flat = total
        if whole and index not in self._norms:
            self._norms[index] = gradient_norm(self.wide.of(flat))
        self.spill.put(index, flat)

    def _bring(self, index: int, flat: torch.Tensor, *, first: bool) -> torch.Tensor:
        """The last of one, in memory with what has come of it before: it goes into its update from there."""
        spill, place = self.spill, self._passing_place(index)
        assert spill is not None
        if first:
            return flat if place is None else self._put(index, flat, place, whole=True)
        total = torch.empty(len(flat), dtype=torch.float32) if place is None else place

        def add(host: torch.Tensor) -> None:
            spill.load(index, total)
            self._add_to(index, total, host, first=False, whole=True)

        self._carry(index, flat, add)
        return total

    def _passing_place(self, index: int) -> torch.Tensor | None:
        """A place in the pool, as soon as there is one; None where there is no pool."""
        if self.pool is None:
            return None
        while (place := self.pool.place(index)) is None:
            assert self.on_full is not None
            self.on_full()
        return place

    def to_disk(self, index: int, gradient: torch.Tensor) -> SpilledGradient:
        """Send one that was whole in memory to disk; its memory is free when this returns.

        Raises:
            DiskError: it, or one before it, cannot be written.
        """
        spill = self.spill
        assert spill is not None
        if self._departures is None:
            spill.put(index, gradient)
        else:  # behind its arrival, and on the thread that has the spill's buffers
            self._departures.then(index, lambda: spill.put(index, gradient))
            with self._waiting():
                self._departures.wait(index)
        return SpilledGradient(elements=len(gradient))

    def await_disk(self, indices: Collection[int]) -> None:
        """Wait until what has gone to disk of some parameters is there: an update is about to read it.

        Raises:
            DiskError: it cannot be written.
        """
        assert self.spill is not None
        with self._waiting():
            self.spill.settle(indices)

    def release(self, block: int) -> None:
        """The gradients of a block have been used, or are elsewhere: its place may hold others'."""
        if self.pool is not None:
            self.pool.release(block)

    # --- called by whoever needs them ---------------------------------------------------------------------------------

    def wait(self, index: int) -> None:
        """Wait until the gradient of a parameter is where it is kept.

        Raises:
            Exception: what came in its way.
        """
        if self._departures is not None:
            self._departures.wait(index)

    def arrived(self) -> None:
        """Wait until what left a device is where it is kept, or on its way to disk. Raises as `wait` does."""
        if self._departures is not None:
            self._departures.settle()

    def settle(self) -> None:
        """The same, and until what goes to disk is there.

        Raises:
            Exception: what came in the way of one. All are worth nothing.
        """
        self.arrived()
        if self.spill is not None:
            with self._waiting():
                self.spill.settle()

    def present(self, index: int, kept: Gradient) -> torch.Tensor:
        """One in memory, where it is kept; a copy of one that is on disk. Raises as `settle` does."""
        self.arrived()
        if isinstance(kept, torch.Tensor):
            return kept
        assert self.spill is not None
        return self.spill.get(index)

    def scale(self, index: int, kept: Gradient, factor: torch.Tensor | float) -> None:
        """Multiply one, in place and in the dtype that it is kept in. Raises as `settle` does."""
        flat = self.present(index, kept)
        flat.mul_(factor.to(flat.device) if isinstance(factor, torch.Tensor) else factor)
        self._norms.pop(index, None)
        if isinstance(kept, SpilledGradient):  # that was a copy
            assert self.spill is not None
            self._norms[index] = gradient_norm(self.wide.of(flat))
            self.spill.put(index, flat)

    def take_norms(self, kept: Sequence[Gradient | None]) -> dict[int, torch.Tensor]:
        """The norms of all that were taken on the way since the last time, and of those on disk. All are settled.

        Raises:
            DiskError: one cannot be read.
        """
        for index, each in enumerate(kept):
            if isinstance(each, SpilledGradient) and index not in self._norms:
                whole = self.wide.room(each.elements)  # of fewer backward passes than there could have been
                assert self.spill is not None
                self.spill.load(index, whole)
                self._norms[index] = gradient_norm(whole)
        norms, self._norms = self._norms, {}
        return norms

    def drop(self, index: int) -> None:
        """What has come of a parameter is not wanted."""
        self.arrived()
        self._norms.pop(index, None)

    def forget(self) -> None:
        """Nothing is wanted of what has come, what failed included.

        Raises:
            StallError: a drive does not let go of it.
        """
        if self._departures is not None:
            self._departures.forget()
        self._norms = {}
        if self.spill is not None:
            self.spill.forget()

    @property
    def waited_s(self) -> float:
        """That the thread which trains has waited for them."""
        if self._departures is not None:  # whose own thread waits for drives, but at the end of a step
            return self._departures.waited_s + self._waited_s
        return 0.0 if self.spill is None else self.spill.waited_s

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited_s += time.perf_counter() - began

    def end(self) -> None:
        """Nothing comes any more: what is on its way is given up."""
        if self._departures is not None:
            self._departures.close()

    def close(self) -> None:
        """Give the memory back, after `end`."""
        for each in (self.room, self.pool, self.spill):
            if each is not None:
                each.close()
