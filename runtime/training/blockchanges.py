"""Blocks while they change: their shards are changed one after the other, on the CPU or on a device apart.

All of it happens on the thread that updates, in the order in which shards were taken. A block begins with its first
shard, and is over with its last one; then others may have it again.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...kernels.optimizer import Clip, Optimizer
from ...kernels.scratch import Scratch
from ...memory.arena import Slot
from ...scheduler.executor import Executor
from ...scheduler.owed import OwedUpdate
from .deviceupdates import LANES, Change, DeviceUpdates
from .intake import Gradient, SpilledGradient
from .shards import SMALL, Piece, Shard
from .spill import GradientSpill
from .spillread import GradientRead
from .weights import Weights


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One update of all weights."""

    gradients: list[Gradient | None]
    """By parameter. Each is dropped when it has been used."""
    hypers: Sequence[Any]
    """Of each parameter."""
    counts: Sequence[int]
    """Which update of each parameter it is, from 1."""
    clip: Clip | None


@dataclass(kw_only=True, eq=False)
class Job:
    """One block of one step."""

    step: Step
    block: int
    left: deque[int]
    """Shards that have not been taken yet."""
    open: int
    """Shards that have not been changed yet."""
    whole: bool = True
    """Whether all shards of the block are changed, as far as their parameters have a gradient."""
    owed: Mapping[int, Sequence[OwedUpdate]] = field(default_factory=dict)
    """Of some shards: updates with a gradient of zero that come first."""
    left_out: set[int] = field(default_factory=set)
    """Of these, shards of which that is all: what the step says is owed, too."""
    lent: Slot | None = None
    """Where the block lies that changes while somebody has it; None for one that nobody has meanwhile."""
    catches_up: bool = False
    """Whether what is owed is all there is: it uses no gradient."""
    over: bool = False
    """Whether all of it has been done."""
    views: Mapping[str, torch.Tensor] | None = None
    """Its weights, from the first change to the last."""

    @property
    def begun(self) -> bool:
        """Whether some of it has been taken: nothing else may be changed before the rest."""
        return len(self.left) < self.open or self.views is not None  # in this order: see `BlockChanges`


class BlockChanges:
    """Changes the shards that a pipeline brings.

    Args:
        executor: Of the model.
        shards: All there are.
        names: Of the parameters.
        weights: Where new weights go.
        kernel: The optimizer's mathematics.
        landed: Waits until the gradient of a parameter is in host memory.
        spill: Where gradients are that have gone to disk.
        device: Updates shards on a device apart.
        on_device: The numbers of those.
    """

    def __init__(
        self,
        *,
        executor: Executor,
        shards: Sequence[Shard],
        names: Sequence[str],
        weights: Weights,
        kernel: Optimizer[Any],
        landed: Callable[[int], None] = lambda _: None,
        spill: GradientSpill | None = None,
        device: DeviceUpdates | None = None,
        on_device: Collection[int] = (),
    ) -> None:
        self.on_used: Callable[[int], None] = lambda _: None
        """Called for each block whose gradients have been used, before anybody can have its weights and make others."""
        self.on_done: Callable[[int], None] = lambda _: None
        """Called for each block that has its new weights."""
        self.on_device = frozenset(on_device)
        self._executor = executor
        self._names = names
        self._weights = weights
        self._kernel = kernel
        self._landed = landed
        self._spill = spill
        self._device = device
        self._scratch = Scratch.of()
        self._pieces = {shard.id: shard.pieces for shard in shards}
        self._parameters: dict[int, set[int]] = {}
        """Of each block."""
        for shard in shards:
            self._parameters.setdefault(shard.block, set()).update(piece.parameter for piece in shard.pieces)
        self._zeros = torch.zeros(0)
        self._taken: dict[int, Job] = {}
        """By shard."""
        self._read: dict[int, GradientRead] = {}
        """Gradients of shards that were taken, on their way back from disk."""

    def take(self, shard: int, job: Job) -> None:
        """A shard will be brought; before others that are taken later."""
        self._taken[shard] = job

    @property
    def reads(self) -> bool:
        """Whether gradients may have to be read; see `beside`."""
        return self._spill is not None

    def beside(self, shard: Shard, room: memoryview) -> GradientRead | None:
        """Begin to read the gradients of a shard that was taken, those that are on disk."""
        assert self._spill is not None
        job = self._taken[shard.id]
        if shard.id in job.left_out:
            return None
        gradients = job.step.gradients
        wanted = {p.parameter for p in shard.pieces if isinstance(gradients[p.parameter], SpilledGradient)}
        reading = self._spill.read(shard, wanted, room)
        if reading is not None:
            self._read[shard.id] = reading
        return reading

    def work(self, shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
        """Change a shard on the CPU."""
        job, changes = self._ready(shard)
        for group in _by_part(changes):
            for piece in _pieces(group, self._scratch.elements):  # all updates of each while it is in the cache
                self._update(piece, arrays, job.step.clip)
        self._end_shard(job)

    def _update(self, change: Change, arrays: Sequence[torch.Tensor], clip: Clip | None) -> None:
        here = slice(change.at, change.at + len(change.gradient))
        self._kernel.update(
            arrays[0][here],
            [array[here] for array in arrays[1:]],
            change.gradient,
            change.hyper,
            step=change.step,
            scratch=self._scratch,
            out=change.weights,
            clip=clip,
        )

    # --- on a device apart: see `Elsewhere` ---------------------------------------------------------------------------

    @property
    def uses_device(self) -> bool:
        """Whether any is changed there."""
        return self._device is not None

    @property
    def at_once(self) -> int:
        """Shards on their way there and back."""
        return LANES

    def takes(self, shard: Shard) -> bool:
        """Whether the device updates this shard."""
        return shard.id in self.on_device

    def waits(self, shard: Shard) -> bool:
        """Whether its block cannot begin before another one is over, of which some are there."""
        job = self._taken[shard.id]
        return job.views is None and not self._weights.is_free(job.block)

    def begin(self, shard: Shard, arrays: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Begin to change a shard there."""
        assert self._device is not None
        job, changes = self._ready(shard)
        wait = self._device.begin(arrays, changes, job.step.clip)

        def finish() -> None:
            wait()
            self._end_shard(job)

        return finish

    # --- around the change of a shard ---------------------------------------------------------------------------------

    def _ready(self, shard: Shard) -> tuple[Job, list[Change]]:
        """What is to be done with a shard that is there."""
        job = self._taken.pop(shard.id)
        read = self._read.pop(shard.id, None)
        views = job.views = self._begin(job) if job.views is None else job.views
        step = job.step
        changes = []
        for piece in shard.pieces:
            weights = views[self._names[piece.parameter]][piece.start : piece.stop]
            for owed in job.owed.get(shard.id, ()):
                zeros = self._zeros_of(piece.elements)
                changes.append(Change(at=piece.at, gradient=zeros, hyper=owed.hyper, step=owed.count, weights=weights))
            gradient = step.gradients[piece.parameter]
            if gradient is None or shard.id in job.left_out:
                continue
            self._landed(piece.parameter)
            change = Change(
                at=piece.at,
                gradient=_values(gradient, piece, read),
                hyper=step.hypers[piece.parameter],
                step=step.counts[piece.parameter],
                weights=weights,
            )
            changes.append(change)
            if piece.stop == (len(gradient) if isinstance(gradient, torch.Tensor) else gradient.elements):
                step.gradients[piece.parameter] = None  # `changes` holds what is left of it
        return job, changes

    def _zeros_of(self, elements: int) -> torch.Tensor:
        """A gradient of so many zeros; pages that nobody has written to take no memory."""
        if len(self._zeros) < elements:
            self._zeros = torch.zeros(elements)
        return self._zeros[:elements]

    def _begin(self, job: Job) -> Mapping[str, torch.Tensor]:
        if job.lent is not None:
            return self._weights.begin_lent(job.block, job.lent)
        if job.block != SMALL:
            self._executor.withdrawn(job.block)
        changed = {self._names[index] for index in self._parameters[job.block] if job.step.gradients[index] is not None}
        whole = job.whole and changed == set(self._weights.names(job.block))
        return self._weights.begin(job.block, whole=whole)

    def _end_shard(self, job: Job) -> None:
        assert job.open, job.block
        job.open -= 1
        if job.open:
            return
        job.views = None
        if job.lent is not None:
            pieces = [piece for shard in job.owed for piece in self._pieces[shard]]
            self._weights.end_lent(job.block, job.lent, [(self._names[p.parameter], p.start, p.stop) for p in pieces])
        else:
            self._weights.end(job.block)
        if not job.catches_up:
            self.use_up(job.step, job.block)
        if job.block != SMALL and job.lent is None:
            self._executor.readmit(job.block)
        job.over = True
        self.on_done(job.block)

    def use_up(self, step: Step, block: int) -> None:
        """Nothing more of a block's gradients is wanted: of experts without tokens some may be left."""
        for parameter in self._parameters.get(block, ()):
            step.gradients[parameter] = None
        self.on_used(block)

    def close(self) -> None:
        """Give memory of the device back."""
        if self._device is not None:
            self._device.close()


def _values(gradient: Gradient, piece: Piece, read: GradientRead | None) -> torch.Tensor:
    """The elements of a piece, flat."""
    if isinstance(gradient, torch.Tensor):
        return gradient[piece.start : piece.stop]
    assert read is not None
    return read.tensors[piece.parameter]


def _by_part(changes: Sequence[Change]) -> Iterator[list[Change]]:
    """The changes of each part of a shard, which are made one after the other."""
    for _, group in itertools.groupby(changes, key=lambda change: change.at):
        yield list(group)


def _pieces(changes: Sequence[Change], most: int) -> Iterator[Change]:
    """The same changes of so many elements at a time: all of the first ones, then all of the next."""
    if len(changes) == 1:
        yield changes[0]
        return
    for start in range(0, len(changes[0].gradient), most):
        here = slice(start, start + most)
        for change in changes:
            yield replace(change, at=change.at + start, gradient=change.gradient[here], weights=change.weights[here])
