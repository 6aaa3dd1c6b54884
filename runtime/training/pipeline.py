"""Reading, changing and writing shards, three at a time: while one is changed the next is read and the last is written.

Bytes: every array of a shard is read once and written once, 12 and 12 per parameter with AdamW. The bound of a run
over all shards is max(work, bytes / mixed rate of the drive); three buffers reach it as long as work and transfers of
a shard take about as long as those of the next.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import torch

from ...memory.arena import PAGE, HostArena, Slot, round_up
from ...memory.disk import DiskEngine, Transfer
from ...memory.errors import StallError
from ...memory.image import whole_window
from ...memory.store import BlockStore, checksum
from .shards import Shard
from .watch import STALL_S, WATCH_S, Watch, failure_of

logger = logging.getLogger(__name__)
BUFFERS: Final = 4
"""Shards in memory: one that is changed, one on each side of it, and one that lets a slow one catch up."""

Work = Callable[[Shard, Sequence[torch.Tensor]], None]
"""Changes the arrays of a shard in place: fp32, [elements] each."""


class ShardPipeline:
    """Carries work out on shards of a block store, from one thread at a time.

    Args:
        store: Where they are; block i is shard i.
        engine: Reads and writes.
        shards: All there are.
        arrays: How many each has.
        watch_s: How often a wait is reported.
        stall_s: How long one may last without a byte moved.
    """

    def __init__(
        self,
        *,
        store: BlockStore,
        engine: DiskEngine,
        shards: Sequence[Shard],
        arrays: int,
        watch_s: float = WATCH_S,
        stall_s: float = STALL_S,
    ) -> None:
        self._store = store
        self._engine = engine
        self._shards = shards
        self._arrays = arrays
        each = max(arrays * shard.array_nbytes for shard in shards)
        self._arena = HostArena(BUFFERS * round_up(each), tier="shards")
        self._free = deque(self._arena.cut(each) for _ in range(BUFFERS))
        self._changed = threading.Condition()
        self._writing: set[int] = set()
        """Shards whose writes have not landed: what is on disk is older than what they hold."""
        self._error: Exception | None = None
        self._worked = 0
        self.watch = Watch(self._moved, watch_s=watch_s, stall_s=stall_s)
        """For all waits of a training that end when shards move on."""

    @property
    def nbytes(self) -> int:
        """Host memory that it takes."""
        return self._arena.nbytes

    @staticmethod
    def needed_nbytes(shards: Sequence[Shard], arrays: int) -> int:
        """What it would take."""
        return BUFFERS * max(arrays * shard.array_nbytes for shard in shards)

    def run(self, take: Callable[[], int | None], work: Work, *, new: bool = False, write: bool = True) -> None:
        """Work on shards until there are no more; returns when the last has been written.

        Args:
            take: Gives the id of the next shard, or None where there is none now. It must not wait. A shard may come
                again when the work on it has been done, whether it has been written or not.
            work: What to do with each.
            new: They are not there yet: nothing is read, and the arrays start as zeros.
            write: Write them back. Without, they are only looked at.

        Raises:
            PenstockError: a shard could not be read or written, or is damaged.
        """
        ahead: deque[tuple[Shard, Slot, Transfer | None]] = deque()
        try:
            while self._read_ahead(take, ahead, new):
                shard, slot, transfer = ahead.popleft()
                writing = False
                try:
                    self._one(shard, slot, transfer, work)
                    if write:
                        self._write(shard, slot)
                        writing = True
                finally:
                    if not writing:  # the write gives it back
                        self._drop(slot, transfer)
        except BaseException:
            for _, slot, transfer in ahead:
                self._drop(slot, transfer)
            try:
                self._all_back()
            except StallError as error:
                logger.warning("%s", error)
            raise
        self._all_back()
        self._raise()

    def _read_ahead(
        self, take: Callable[[], int | None], ahead: deque[tuple[Shard, Slot, Transfer | None]], new: bool
    ) -> bool:
        """Start reading as many as there are buffers for, one at least. Whether there is anything to work on."""
        while (slot := self._take(wait=not ahead)) is not None:
            number = take()
            if number is None:
                self._give_back(slot)
                break
            shard = self._shards[number]
            try:
                ahead.append((shard, slot, None if new else self._read(shard, slot)))
            except BaseException:  # the drive's threads have been stopped, for one
                self._give_back(slot)
                raise
        return bool(ahead)

    def _read(self, shard: Shard, slot: Slot) -> Transfer:
        self._wait(
            lambda: shard.id not in self._writing or self._error,
            f"shard {shard.id} is to be read, and waits for its own write",
        )
        span = self._store.location(shard.id)
        window = whole_window(span.path, span.offset, round_up(span.nbytes))
        return self._engine.read([window], [], self._arena.view(slot.offset, slot.nbytes))

    def _one(self, shard: Shard, slot: Slot, transfer: Transfer | None, work: Work) -> None:
        raw = self._arena.view(slot.offset, self._arrays * shard.array_nbytes)
        if transfer is None:
            raw[:] = bytes(len(raw))
        else:
            self.watch.transfer(transfer, lambda: f"an update waits for shard {shard.id} to be read; {self.report()}")
            self._store.check(shard.id, raw)
        work(shard, arrays_of(raw, shard, self._arrays))
        self._worked += 1

    def _write(self, shard: Shard, slot: Slot) -> None:
        raw = self._arena.view(slot.offset, self._arrays * shard.array_nbytes)
        found = checksum(raw)
        span = self._store.begin_write(shard.id)
        assert span is not None
        try:
            transfer = self._engine.write(span.path, span.offset, raw)
        except Exception as error:
            self._store.write_failed(shard.id, error)
            raise
        with self._changed:
            self._writing.add(shard.id)

        def landed(done: Transfer) -> None:
            try:
                if (failure := failure_of(done)) is None:
                    self._store.written(shard.id, found)
                else:
                    self._fail(failure)
                    self._store.write_failed(shard.id, failure)
            except Exception as error:  # it must surface where the work is done, not in a thread of the drive
                self._fail(error)
            finally:
                with self._changed:
                    self._writing.discard(shard.id)
                self._give_back(slot)

        transfer.add_done_callback(landed)

    def _take(self, *, wait: bool) -> Slot | None:
        if wait:
            self._wait(lambda: self._free or self._error, "the next shard waits for a buffer")
        with self._changed:
            self._raise()
            return self._free.popleft() if self._free else None

    def _drop(self, slot: Slot, transfer: Transfer | None) -> None:
        """Give a buffer back as soon as nothing is read into it any more."""
        if transfer is None:
            self._give_back(slot)
        else:
            transfer.cancel()
            transfer.add_done_callback(lambda _: self._give_back(slot))

    def _give_back(self, slot: Slot) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def _all_back(self) -> None:
        self._wait(lambda: len(self._free) == BUFFERS, "the last shards are to be written")

    def _wait(self, ready: Callable[[], object], what: str) -> None:
        with self._changed:
            self.watch.wait(lambda s: self._changed.wait_for(ready, timeout=s), lambda: f"{what}; {self.report()}")

    def _moved(self) -> int:
        statistics = self._engine.statistics()
        return statistics.read_nbytes + statistics.written_nbytes + self._worked

    def report(self) -> str:
        """Where shards are, for who waits."""
        writing = ", ".join(str(number) for number in sorted(self._writing.copy())) or "none"
        folders = ", ".join(str(folder) for folder in self._store.folders)
        return f"{len(self._free)} of {BUFFERS} buffers are free, shards being written to {folders}: {writing}"

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Give the memory back, unless a drive that hangs may still write into it."""
        if len(self._free) == BUFFERS:
            self._arena.close()


def arrays_of(raw: memoryview, shard: Shard, count: int) -> list[torch.Tensor]:
    """The arrays of a shard, [elements] each, as views of its bytes."""
    assert shard.array_nbytes % PAGE == 0
    return [
        torch.frombuffer(raw, dtype=torch.float32, count=shard.elements, offset=index * shard.array_nbytes)
        for index in range(count)
    ]
