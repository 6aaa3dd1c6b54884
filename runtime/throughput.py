"""Many prompts through one model: micro-batches in lanes, which share every sweep over the weights.

A lane is a thread that takes one micro-batch after another and runs the model's own `generate` on it. While one lane
computes on the device, and one on the CPU where the schedule says so, the others wait at a block (`sweep.py`). A model
that is resident as a whole has one lane and no sweeps.
"""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from ..memory.errors import ClosedError, PenstockError
from ..scheduler.microbatches import MicroBatch, Prefills, Schedule
from .build import Machinery
from .sweep import StoppedError, Sweep
from .throughput_batch import Row, Ways, run_batch
from .widening import Widening

logger = logging.getLogger(__name__)

_NAMED: Final = 5
"""Prompts that an error names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One prompt's continuation."""

    index: int
    """Of the prompt, counted from 0."""
    prompt_tokens: int
    ids: tuple[int, ...]
    """The new tokens, the one that ends the text included."""
    finish: Literal["stop", "length"]
    """Whether the model ended the text, or the number of new tokens did."""
    text: str | None = None
    """None where there is no tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputStatistics:
    """How far a run is."""

    prompts: int
    finished: int
    tokens: int
    """New tokens so far."""
    share: float
    """Of all the new tokens that may come, those that have come or will not."""
    sweeps: int
    """Sweeps over the weights so far; 0 where all of them are resident."""
    cpu_share: float
    """The part of the weights that lanes have used, by bytes and as often as they did, that the CPU computed with while
    others went on on the device; 0 where one processor computes."""
    schedule: Schedule


class Work:
    """What the threads of one run share. Starts them; they end by themselves, or after `stop`."""

    def __init__(
        self,
        model: Any,
        machinery: Machinery | None,
        schedule: Schedule,
        rows: Sequence[Row],
        ways: Ways,
        *,
        wide_from: int | None = None,
    ) -> None:
        """Start.

        Args:
            wide_from: Rows from which products are computed in fp32; None for never.
        """
        self.results: queue.SimpleQueue[Completion | None] = queue.SimpleQueue()
        """Completions as they come, then None."""
        self.failure: BaseException | None = None
        self._model = model
        self._machinery = machinery
        self._schedule = schedule
        self._rows = {row.index: row for row in rows}
        self._ways = ways
        self._wide_from = wide_from
        self._waiting = deque(schedule.batches)
        self._prefills = Prefills(schedule.prefill_tokens)
        self._stopping = False
        self._sweep: Sweep | None = None
        self._tokens = self._spared = self._finished = 0
        self._all_tokens = sum(row.new_tokens for row in rows)
        self._thread = threading.Thread(target=self._supervise, name="penstock-throughput", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Have the threads end soon: at the next block or token."""
        self._stopping = True
        if self._sweep is not None:
            self._sweep.stop()

    def join(self) -> None:
        """Wait until the threads have ended."""
        self._thread.join()

    def statistics(self) -> ThroughputStatistics:
        """A frozen record of the totals."""
        return ThroughputStatistics(
            prompts=len(self._rows),
            finished=self._finished,
            tokens=self._tokens,
            share=(self._tokens + self._spared) / self._all_tokens,
            sweeps=0 if self._sweep is None else self._sweep.ended,
            cpu_share=0.0 if self._sweep is None else self._sweep.cpu_share,
            schedule=self._schedule,
        )

    # --- the supervisor's thread ------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        machinery = self._machinery
        try:
            if machinery is None:
                self._run_alone()
            elif machinery.layout.resident:
                with machinery.session.alone():  # closing the model waits for it
                    self._run_alone()
            else:
                self._run_lanes(machinery)
        except BaseException as error:  # all of them are raised where results are read
            self._fail(error)
        finally:
            self.results.put(None)

    def _run_alone(self) -> None:
        try:
            while self._waiting:
                self._run(self._waiting.popleft())
        except StoppedError:
            pass

    def _run_lanes(self, machinery: Machinery) -> None:
        session, front = machinery.session, machinery.front
        nbytes = {block.id: block.image.data_nbytes for block in machinery.layout.blocks}
        share = self._schedule.cpu_share
        sweep = Sweep(
            machinery.executor,
            members=range(self._schedule.lanes),
            resident=lambda block: block in front.permanent,
            computed=machinery.device.computed,
            on_cpu=frozenset() if session.on_cpu is None else machinery.units.part(share, nbytes),
            ahead=machinery.layout.spare_slots,
            nbytes=nbytes,
            places=() if session.experts is None else session.experts.places,
        )
        with session.alone(sweep):
            self._sweep = sweep
            if self._stopping:
                return
            threads = []
            for lane in range(self._schedule.lanes):
                thread = threading.Thread(target=self._lane, args=(lane,), name=f"penstock-lane-{lane}", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # the system gives no more threads: the others are to end
                    self._fail(error)
                    sweep.withdraw(lane)
                else:
                    threads.append(thread)
            sweep.start()
            for thread in threads:
                thread.join()

    # --- the lanes' threads -----------------------------------------------------------------------------------------

    def _lane(self, lane: int) -> None:
        torch.get_num_threads()  # the first call gives this thread's team the size that the process was told
        sweep = self._sweep
        assert sweep is not None
        try:
            with sweep.taking_part(lane):
                while self._waiting:
                    batch = self._waiting.popleft()
                    while not self._prefills.admits(batch, coming=sweep.coming):
                        sweep.rest()
                    self._run(batch)
        except StoppedError:
            pass
        except BaseException as error:  # as above
            self._fail(error)

    def _run(self, batch: MicroBatch) -> None:
        rows = [self._rows[index] for index in batch.indices]
        try:
            self._check()
            with nullcontext() if self._wide_from is None else Widening(self._wide_from):
                run_batch(self._model, batch, rows, self._ways, self._step)
        except StoppedError:
            raise
        except PenstockError as error:
            error.add_note(_where(rows))
            raise
        except Exception as error:  # of torch, or of the model's own code: it says nothing of prompts
            raise PenstockError(f"{_where(rows)}: {type(error).__name__}: {error}") from error

    def _step(self, rows: list[Row]) -> None:
        """Some rows of a micro-batch have got a token each."""
        self._tokens += len(rows)
        for row in rows:
            if row.ended:
                self._spared += row.new_tokens - len(row.ids)
                self._finished += 1
                self.results.put(
                    Completion(
                        index=row.index,
                        prompt_tokens=len(row.prompt),
                        ids=tuple(row.ids),
                        finish="stop" if row.stopped else "length",
                    )
                )
        self._check()

    def _check(self) -> None:
        if self._stopping:
            raise StoppedError
        if self._machinery is not None and self._machinery.closing:
            raise ClosedError("the model was closed while prompts were waiting; load it again")

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
        self.stop()


def _where(rows: Sequence[Row]) -> str:
    """The prompts that a failure struck."""
    struck = [row.index for row in rows if not row.ended] or [row.index for row in rows]
    named = ", ".join(str(index) for index in struck[:_NAMED]) + (" and others" if len(struck) > _NAMED else "")
    return f"in the micro-batch of prompt{'s' * (len(struck) > 1)} {named}"


def _abandon(work: Work) -> None:
    """End a run that nobody reads."""
    work.stop()
    if threading.current_thread() is threading.main_thread():  # else it may be one of the very threads that must end
        work.join()


class Completions:
    """The results of a run, as they come: an iterator, and a context manager that ends the run.

    Dropping it ends the run too.
    """

    def __init__(self, work: Work, *, ordered: bool, decode: Callable[[tuple[int, ...]], str] | None) -> None:
        self._work = work
        self._ordered = ordered
        self._decode = decode
        self._early: dict[int, Completion] = {}
        self._next = 0
        self._ended = False
        weakref.finalize(self, _abandon, work)

    def __iter__(self) -> Completions:
        return self

    def __next__(self) -> Completion:
        """The next completion that is there, in order of the prompts where that was asked for.

        Raises:
            PenstockError: the run failed; what was finished before has come before.
        """
        try:
            while not self._ended:
                if self._ordered and self._next in self._early:
                    self._next += 1
                    return self._early.pop(self._next - 1)
                found = self._work.results.get()
                if found is None:
                    self._ended = True
                elif not self._ordered:
                    return self._told(found)
                else:
                    self._early[found.index] = self._told(found)
        except BaseException:  # an interrupt of whoever reads: nobody will read on
            self.close()
            raise
        self._work.join()
        if self._early:  # of a run that failed: the gaps will not be filled
            return self._early.pop(min(self._early))
        if self._work.failure is not None:
            failure, self._work.failure = self._work.failure, None
            raise failure
        raise StopIteration

    def _told(self, found: Completion) -> Completion:
        if self._decode is None:
            return found
        text = self._decode(found.ids)
        return Completion(
            index=found.index, prompt_tokens=found.prompt_tokens, ids=found.ids, finish=found.finish, text=text
        )

    def statistics(self) -> ThroughputStatistics:
        """How far the run is. From any thread."""
        return self._work.statistics()

    def close(self) -> None:
        """End the run, and wait for its threads. What is not finished is lost."""
        self._ended = True
        self._early.clear()
        self._work.stop()
        self._work.join()
        self._work.failure = None

    def __enter__(self) -> Completions:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()
