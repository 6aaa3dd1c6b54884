"""Updates on their way: a queue of blocks, and a thread that changes one after the other.

A block that is submitted is withdrawn at once: nobody gets a lease on it until its new weights are there. Then its
shards pass through the pipeline, back to back with those of the blocks before and after it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from ...kernels.optimizer import Clip, Optimizer
from ...kernels.scratch import Scratch
from ...memory.errors import PenstockError, StallError
from ...scheduler.executor import Executor
from .deviceupdates import LANES, Change, DeviceUpdates
from .gradients import Gradient, SpilledGradient
from .pipeline import ShardPipeline
from .shards import Piece, Shard
from .spill import GradientRead, GradientSpill
from .watch import WATCH_S
from .weights import Weights

logger = logging.getLogger(__name__)
SMALL: Final = 0
"""The block of small tensors, which is lent for good and cannot be withdrawn."""


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
class _Job:
    """One block of one step."""

    step: Step
    block: int
    left: deque[int]
    """Shards that have not been taken yet."""
    open: int
    """Shards that have not been changed yet."""
    views: Mapping[str, torch.Tensor] | None = None


@dataclass(kw_only=True, eq=False)
class _UnderWay:
    """A shard that the device is changing."""

    wait: Callable[[], None]
    finish: Callable[[], None] = lambda: None
    """Waits for it, unless that was done before."""


class Updater:
    """Changes blocks, in the order in which they are submitted.

    Args:
        executor: Of the model.
        shards: All there are.
        names: Of the parameters.
        pipeline: Reads and writes shards.
        weights: Where new weights go.
        kernel: The optimizer's mathematics.
        spill: Where gradients are that have gone to disk.
        device: Updates shards on a device apart.
        on_device: The numbers of those.
        landed: Waits until the gradient of a parameter is in host memory.
        finished: Called for each block that has been changed: its gradients have been used.
    """

    def __init__(
        self,
        *,
        executor: Executor,
        shards: Sequence[Shard],
        names: Sequence[str],
        pipeline: ShardPipeline,
        weights: Weights,
        kernel: Optimizer[Any],
        spill: GradientSpill | None = None,
        device: DeviceUpdates | None = None,
        on_device: Collection[int] = (),
        landed: Callable[[int], None] = lambda _: None,
        finished: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._landed, self._finished = landed, finished
        self._device, self._on_device = device, frozenset(on_device)
        self._away: deque[_UnderWay] = deque()
        """Shards that the device is changing, the oldest first."""
        self._executor = executor
        self._spill = spill
        self._names = names
        self._pipeline = pipeline
        self._weights = weights
        self._kernel = kernel
        self._scratch = Scratch.of()
        self._shards: dict[int, list[Shard]] = {}
        for shard in shards:
            self._shards.setdefault(shard.block, []).append(shard)
        self._queue: deque[_Job] = deque()
        self._taken: dict[int, _Job] = {}
        """By shard."""
        self._read: dict[int, GradientRead] = {}
        """Gradients of shards that were taken, on their way back from disk."""
        self._unfinished: set[int] = set()
        """Blocks."""
        self._changed = threading.Condition()
        self._busy = False
        """Whether anything was submitted whose shards have not all been written."""
        self._closed = False
        self._error: Exception | None = None
        self._told = False
        """Whether somebody was told of that."""
        self._failure: PenstockError | None = None
        """What those are told who ask for a block."""
        self._thread = threading.Thread(target=self._run, name="penstock-update", daemon=True)
        self._thread.start()

    # --- called by the thread that trains -----------------------------------------------------------------------------

    def submit(self, step: Step, blocks: Iterable[int], *, urgent: bool = False) -> None:
        """Change blocks after those that were submitted before; `urgent`: before those that have not been begun.

        Raises:
            PenstockError: what an update before met.
        """
        self.check()
        for block in blocks:
            shards = [
                shard.id
                for shard in self._shards[block]
                if any(step.gradients[piece.parameter] is not None for piece in shard.pieces)
            ]
            job = _Job(step=step, block=block, left=deque(shards), open=len(shards))
            if block != SMALL:
                self._executor.core.withdraw(block)
            with self._changed:
                self._unfinished.add(block)
                self._busy = True
                begun = bool(self._queue) and len(self._queue[0].left) < self._queue[0].open
                self._queue.insert(int(begun) if urgent else len(self._queue), job)
                self._changed.notify_all()

    def by_block(self) -> None:
        """Change what has not been begun in the order of block numbers, which is that of a forward."""
        with self._changed:
            begun = bool(self._queue) and len(self._queue[0].left) < self._queue[0].open
            first = [self._queue.popleft()] if begun else []
            self._queue = deque([*first, *sorted(self._queue, key=lambda job: job.block)])

    def wait(self, block: int | None = None) -> None:
        """Wait until a block has its new weights, or until all have, and masters and states are in the store.

        Raises:
            PenstockError: it could not be.
        """
        self._wait(
            lambda: not (self._busy if block is None else block in self._unfinished),
            "the end of the last step" if block is None else f"the new weights of block {block}",
        )

    def wait_below(self, count: int) -> None:
        """Wait until fewer blocks than this are waiting or being changed. Raises as `wait` does."""
        self._wait(lambda: len(self._unfinished) < count, f"fewer than {count} blocks that are to be updated")

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        try:
            with self._changed:
                self._pipeline.watch.wait(
                    lambda s: self._changed.wait_for(lambda: self._error or ready(), timeout=s),
                    lambda: f"waiting for {what}; {self._report()}",
                )
        except StallError:
            self._told = True  # of all that the thread will have to say
            raise
        self.check()

    def _report(self) -> str:
        with self._changed:
            at = f"block {self._queue[0].block} is next" if self._queue else "none is waiting"
            return f"{len(self._unfinished)} blocks are not updated yet, {at}; {self._pipeline.report()}"

    def check(self) -> None:
        """Raise what an update met."""
        if self._error is not None:
            self._told = True
            raise self._error

    def end(self) -> None:
        """Finish what was submitted: nothing more will be.

        Raises:
            PenstockError: it could not be, and nobody has been told yet, by `check` or when asking for a block.
        """
        raised = self._failure is not None and self._failure.__traceback__ is not None
        if not self._told and not raised:
            self.wait()

    def close(self) -> None:
        """Finish what was submitted, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        while self._thread.is_alive():
            self._thread.join(WATCH_S)
            if self._thread.is_alive():
                logger.warning("closing waits for the update under way; %s", self._report())
        if self._device is not None:
            self._device.close()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
            try:
                self._pipeline.run(
                    self._take,
                    self._work,
                    beside=None if self._spill is None else self._beside,
                    elsewhere=None if self._device is None else self,
                )
            except Exception as error:  # it must surface in the thread that trains, and free whoever waits for a block
                logger.debug("an update failed", exc_info=True)
                self._fail(error)
                return
            with self._changed:
                self._busy = bool(self._queue)
                self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        failure = PenstockError(
            f"an update of the weights failed: {error}. What was committed is not lost: penstock.close(model), then go "
            "on with penstock.resume(folder)"
        )
        failure.__cause__ = error
        with self._changed:
            self._error, self._failure = error, failure
            self._queue.clear()
            self._changed.notify_all()
        self._executor.fail(failure)

    def _take(self) -> int | None:
        """The next shard; None where there is none now."""
        with self._changed:
            while self._queue:
                job = self._queue[0]
                if job.left:
                    shard = job.left.popleft()
                    if not job.left:
                        self._queue.popleft()
                    self._taken[shard] = job
                    return shard
                self._queue.popleft()
            return None

    def _beside(self, shard: Shard, room: memoryview) -> GradientRead | None:
        """Begin to read the gradients of a shard that was taken, those that are on disk."""
        assert self._spill is not None
        gradients = self._taken[shard.id].step.gradients
        wanted = {p.parameter for p in shard.pieces if isinstance(gradients[p.parameter], SpilledGradient)}
        reading = self._spill.read(shard, wanted, room)
        if reading is not None:
            self._read[shard.id] = reading
        return reading

    def _work(self, shard: Shard, arrays: Sequence[torch.Tensor]) -> None:
        """Change a shard on the CPU."""
        job, changes = self._ready(shard)
        for change in changes:
            here = slice(change.at, change.at + len(change.gradient))
            self._kernel.update(
                arrays[0][here],
                [array[here] for array in arrays[1:]],
                change.gradient,
                change.hyper,
                step=change.step,
                scratch=self._scratch,
                out=change.weights,
                clip=job.step.clip,
            )
        self._changed_shard(job, shard)

    # --- on a device apart --------------------------------------------------------------------------------------------

    @property
    def at_once(self) -> int:
        """See `Elsewhere`."""
        return LANES

    def takes(self, shard: Shard) -> bool:
        """Whether the device updates this shard."""
        return shard.id in self._on_device

    def begin(self, shard: Shard, arrays: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Begin to change a shard there. See `Elsewhere`."""
        assert self._device is not None
        job, changes = self._ready(shard)
        under_way = _UnderWay(wait=self._device.begin(arrays, changes, job.step.clip))

        def finish() -> None:
            if under_way in self._away:
                self._away.remove(under_way)
                under_way.wait()
                self._changed_shard(job, shard)

        under_way.finish = finish
        self._away.append(under_way)
        return finish

    # --- around the change of a shard ---------------------------------------------------------------------------------

    def _ready(self, shard: Shard) -> tuple[_Job, list[Change]]:
        """What is to be done with a shard that is there."""
        with self._changed:
            job = self._taken.pop(shard.id)
        read = self._read.pop(shard.id, None)
        if job.views is None:
            if not self._weights.is_free(job.block):
                while self._away:
                    self._away[0].finish()
            job.views = self._begin(job)
        step = job.step
        changes = []
        for piece in shard.pieces:
            gradient = step.gradients[piece.parameter]
            if gradient is None:
                continue
            self._landed(piece.parameter)
            change = Change(
                at=piece.at,
                gradient=_values(gradient, piece, read),
                hyper=step.hypers[piece.parameter],
                step=step.counts[piece.parameter],
                weights=job.views[self._names[piece.parameter]][piece.start : piece.stop],
            )
            changes.append(change)
            if piece.stop == (len(gradient) if isinstance(gradient, torch.Tensor) else gradient.elements):
                step.gradients[piece.parameter] = None  # `changes` holds what is left of it
        return job, changes

    def _changed_shard(self, job: _Job, shard: Shard) -> None:
        assert job.open, shard
        job.open -= 1
        if not job.open:
            self._finish(job)

    def _begin(self, job: _Job) -> Mapping[str, torch.Tensor]:
        if job.block != SMALL:
            self._executor.withdrawn(job.block)
        trained = {piece.parameter for shard in self._shards[job.block] for piece in shard.pieces}
        changed = {self._names[index] for index in trained if job.step.gradients[index] is not None}
        return self._weights.begin(job.block, whole=changed == set(self._weights.names(job.block)))

    def _finish(self, job: _Job) -> None:
        self._weights.end(job.block)
        job.views = None
        if job.block != SMALL:
            self._executor.readmit(job.block)
        self._finished(job.block)
        with self._changed:
            self._unfinished.discard(job.block)
            self._changed.notify_all()


def _values(gradient: Gradient, piece: Piece, read: GradientRead | None) -> torch.Tensor:
    """The elements of a piece, flat."""
    if isinstance(gradient, torch.Tensor):
        return gradient[piece.start : piece.stop]
    assert read is not None
    return read.tensors[piece.parameter]
