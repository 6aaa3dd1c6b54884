"""Updates on their way: a queue of blocks, and a thread that changes one after the other.

A block that is submitted is withdrawn at once: nobody gets a lease on it until its new weights are there. Then its
shards pass through the pipeline, back to back with those of the blocks before and after it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ...memory.arena import Slot
from ...memory.errors import PenstockError, StallError
from ...scheduler.executor import Executor
from .blockchanges import BlockChanges, Job, Step
from .owing import Owed, Owing, Todo
from .pipeline import ShardPipeline
from .shards import SMALL, Shard
from .watch import WATCH_S

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cut:
    """Something to be done between two updates."""

    make: Callable[[], object]
    failed: Callable[[Exception], None]


class Updater:
    """Changes blocks, in the order in which they are submitted.

    Args:
        executor: Of the model.
        shards: All there are.
        pipeline: Reads and writes shards.
        changes: Changes them.
        used: Called for each block that has been changed, before anybody can have its weights: its gradients have been
            used.
        owing: Which shards may wait for a later step, if any may.
    """

    def __init__(
        self,
        *,
        executor: Executor,
        shards: Sequence[Shard],
        pipeline: ShardPipeline,
        changes: BlockChanges,
        used: Callable[[int], None] = lambda _: None,
        owing: Owing | None = None,
    ) -> None:
        self._executor = executor
        self._pipeline = pipeline
        self._changes = changes
        self._owing = owing
        changes.on_used = used
        changes.on_done = self._done
        self._shards: dict[int, list[Shard]] = {}
        for shard in shards:
            self._shards.setdefault(shard.block, []).append(shard)
        self._queue: deque[Job | _Cut] = deque()
        self._unfinished: Counter[int] = Counter()
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
        count = 1 + max((piece.parameter for shard in shards for piece in shard.pieces), default=-1)
        self._nothing = Step(gradients=[None] * count, hypers=(), counts=(), clip=None)
        """A step without a gradient."""
        self.waited_s = 0.0
        """That the thread which trains has waited for updates."""
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
            todo = Todo(shards=shards) if self._owing is None else self._owing.choose(step, block, shards)
            if not todo.shards:
                self._changes.use_up(step, block)
                continue
            whole = len(todo.shards) == len(shards)
            job = Job(
                step=step, block=block, left=deque(todo.shards), open=len(todo.shards), whole=whole, owed=todo.owed
            )
            if block != SMALL:
                self._executor.core.withdraw(block)
            self._put(job, urgent=urgent)

    def _put(self, job: Job, *, urgent: bool) -> None:
        """Have one done, after all others or before those that may wait."""
        with self._changed:
            self._unfinished[job.block] += 1
            self._busy = True
            self._queue.insert(self._first_place() if urgent else len(self._queue), job)
            self._changed.notify_all()

    def catch_up(self, block: int, settle: Callable[[], Owed], *, lent: Slot | None = None) -> None:
        """Make updates that shards of a block owe.

        Args:
            block: The block.
            settle: Says what is owed, by shard, and takes it for made from then on: called when nothing is left to be
                waited for, so that an interrupt before leaves it owed.
            lent: Where the caller has the block, and keeps it until this returns, when they have been made. None where
                it may not be had meanwhile: then this returns as soon as no other update of it is under way.

        Raises:
            PenstockError: what an update met.
        """
        self.check()
        if lent is None:
            if self._joined(block, settle):
                return
            self.wait(block)
        owed = settle()
        if not owed:
            return
        job = Job(
            step=self._nothing,
            block=block,
            left=deque(owed),
            open=len(owed),
            whole=False,
            owed=owed,
            lent=lent,
            catches_up=True,
        )
        if lent is None:
            self._executor.core.withdraw(block)
            self._put(job, urgent=False)
            return
        self._put(job, urgent=True)
        self._wait_lent(job)

    def _joined(self, block: int, settle: Callable[[], Owed]) -> bool:
        """Whether a job of the same block has still been waiting, and makes what is owed, too."""
        with self._changed:
            for job in self._queue:
                if isinstance(job, Job) and job.block == block and not job.begun:
                    owed = settle()
                    job.left.extend(owed)
                    job.open += len(owed)
                    job.owed = {**job.owed, **owed}
                    job.left_out |= owed.keys()
                    return True
        return False

    def _wait_lent(self, job: Job) -> None:
        """Wait for a block that changes where it is lent: until then its slot must not hold anything else."""
        interrupt: BaseException | None = None
        while not job.over:
            try:
                self._wait(lambda: job.over, f"updates that experts of block {job.block} owe")
            except StallError as error:
                self._fail(error)
                raise
            except Exception:
                raise  # no update is made any more, and nobody gets a block
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def by_block(self) -> None:
        """Change what may wait in the order of block numbers, which is that of a forward."""
        with self._changed:
            place, queue = self._first_place(), list(self._queue)
            waiting = [each for each in queue[place:] if isinstance(each, Job)]
            self._queue = deque([*queue[:place], *sorted(waiting, key=lambda job: job.block)])

    def _first_place(self) -> int:
        """Where in the queue something comes before all that may wait: not before a cut, or what has been begun."""
        cuts = [place for place, each in enumerate(self._queue) if isinstance(each, _Cut)]
        if cuts:
            return cuts[-1] + 1
        first = self._queue[0] if self._queue else None
        return int(isinstance(first, Job) and first.begun)

    def between(self, make: Callable[[], object], failed: Callable[[Exception], None]) -> None:
        """Have something done after all that was submitted, and before all that will be; returns at once.

        Args:
            make: Called by the thread that updates. An error ends all updates, as one of an update does.
            failed: Called with the reason where it is not done, or fails.

        Raises:
            PenstockError: what an update before met.
        """
        with self._changed:
            self.check()
            self._queue.append(_Cut(make=make, failed=failed))
            self._busy = True
            self._changed.notify_all()

    def wait(self, block: int | None = None) -> None:
        """Wait until a block has its new weights, or until all have, and masters and states are in the store.

        Raises:
            PenstockError: it could not be.
        """
        self._wait(
            lambda: not (self._busy if block is None else block in self._unfinished),
            "the end of the last step" if block is None else f"the new weights of block {block}",
        )

    @property
    def unfinished(self) -> int:
        """Blocks that are waiting or being changed."""
        with self._changed:
            return len(self._unfinished)

    def wait_below(self, count: int) -> None:
        """Wait until fewer blocks than this are waiting or being changed. Raises as `wait` does."""
        self._wait(lambda: len(self._unfinished) < count, f"fewer than {count} blocks that are to be updated")

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        began = time.perf_counter()
        try:
            with self._changed:
                self._pipeline.watch.wait(
                    lambda s: self._changed.wait_for(lambda: self._error or ready(), timeout=s),
                    lambda: f"waiting for {what}; {self._report()}",
                )
        except StallError:
            self._told = True  # of all that the thread will have to say
            raise
        finally:
            self.waited_s += time.perf_counter() - began
        self.check()

    def _report(self) -> str:
        with self._changed:
            first = self._queue[0] if self._queue else None
            at = f"block {first.block} is next" if isinstance(first, Job) else "none is waiting"
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
        self._changes.close()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
            try:
                changes = self._changes
                self._pipeline.run(
                    self._take,
                    changes.work,
                    beside=changes.beside if changes.reads else None,
                    elsewhere=changes if changes.uses_device else None,
                )
                self._make_cut()
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
            cuts = [each for each in self._queue if isinstance(each, _Cut)]
            self._queue.clear()
            self._changed.notify_all()
        for cut in cuts:
            cut.failed(error)
        self._executor.fail(failure)

    def _make_cut(self) -> None:
        """Do what is to be done between two updates, if that is next."""
        with self._changed:
            first = self._queue[0] if self._queue else None
            if not isinstance(first, _Cut):
                return
            self._queue.popleft()
        try:
            first.make()
        except Exception as error:
            first.failed(error)
            raise

    def _take(self) -> int | None:
        """The next shard; None where there is none now: before a cut, all shards are to be written."""
        with self._changed:
            while self._queue:
                job = self._queue[0]
                if isinstance(job, _Cut):
                    return None
                if job.left:
                    shard = job.left.popleft()
                    if not job.left:
                        self._queue.popleft()
                    self._changes.take(shard, job)
                    return shard
                self._queue.popleft()
            return None

    def _done(self, block: int) -> None:
        """A block has its new weights."""
        with self._changed:  # it may have been submitted again, once its weights could be had
            self._unfinished -= Counter([block])
            self._changed.notify_all()
