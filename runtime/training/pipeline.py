"""Reading, changing and writing shards, three at a time: while one is changed the next is read and the last is written.

Bytes: every array of a shard is read once and written once, 12 and 12 per parameter with AdamW. The bound of a run
over all shards is max(work, bytes / mixed rate of the drive); three buffers reach it as long as work and transfers of
a shard take about as long as those of the next.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import torch

from ...memory.arena import PAGE, HostArena, Slot, round_up
from ...memory.disk import DiskEngine, Transfer
from ...memory.errors import StallError
from ...memory.image import whole_window
from ...memory.store import BlockStore, checksum
from .shards import Shard

BUFFERS: Final = 4
"""Shards in memory: one that is changed, one on each side of it, and one that lets a slow one catch up."""
STALL_S: Final = 120.0

Work = Callable[[Shard, Sequence[torch.Tensor]], None]
"""Changes the arrays of a shard in place: fp32, [elements] each."""


class Pipeline(Protocol):
    """What carries work out on shards, wherever they are."""

    def run(self, take: Callable[[], int | None], work: Work, *, new: bool = False, write: bool = True) -> None:
        """Work on shards until there are no more."""
        ...

    def write_out(self) -> None:
        """See that the store has the present state of all shards."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class ShardPipeline:
    """Carries work out on shards of a block store, from one thread at a time.

    Args:
        store: Where they are; block i is shard i.
        engine: Reads and writes.
        shards: All there are.
        arrays: How many each has.
    """

    def __init__(self, *, store: BlockStore, engine: DiskEngine, shards: Sequence[Shard], arrays: int) -> None:
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
                        self._give_back(slot)
        finally:
            for _, slot, transfer in ahead:
                if transfer is not None:
                    transfer.cancel()
                    transfer.add_done_callback(lambda _, slot=slot: self._give_back(slot))  # type: ignore[misc]
                else:
                    self._give_back(slot)
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
        with self._changed:
            if not self._changed.wait_for(lambda: shard.id not in self._writing or self._error, timeout=STALL_S):
                raise _stalled()
        span = self._store.location(shard.id)
        window = whole_window(span.path, span.offset, round_up(span.nbytes))
        return self._engine.read([window], [], self._arena.view(slot.offset, slot.nbytes))

    def _one(self, shard: Shard, slot: Slot, transfer: Transfer | None, work: Work) -> None:
        raw = self._arena.view(slot.offset, self._arrays * shard.array_nbytes)
        if transfer is None:
            raw[:] = bytes(len(raw))
        else:
            transfer.wait()
            self._store.check(shard.id, raw)
        work(shard, arrays_of(raw, shard, self._arrays))

    def _write(self, shard: Shard, slot: Slot) -> None:
        raw = self._arena.view(slot.offset, self._arrays * shard.array_nbytes)
        found = checksum(raw)
        span = self._store.begin_write(shard.id)
        assert span is not None
        with self._changed:
            self._writing.add(shard.id)
        transfer = self._engine.write(span.path, span.offset, raw)

        def landed(done: Transfer) -> None:
            try:
                if done.error is None:
                    self._store.written(shard.id, found)
                else:
                    self._store.write_failed(shard.id, done.error)
                    self._fail(done.error)
            except Exception as error:  # it must surface where the work is done, not in a thread of the drive
                self._fail(error)
            finally:
                with self._changed:
                    self._writing.discard(shard.id)
                self._give_back(slot)

        transfer.add_done_callback(landed)

    def _take(self, *, wait: bool) -> Slot | None:
        with self._changed:
            if wait and not self._changed.wait_for(lambda: self._free or self._error, timeout=STALL_S):
                raise _stalled()
            self._raise()
            return self._free.popleft() if self._free else None

    def _give_back(self, slot: Slot) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def _all_back(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._free) == BUFFERS, timeout=STALL_S):
                raise _stalled()

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def write_out(self) -> None:
        """Nothing is left to do: `run` returns when all has been written."""

    def close(self) -> None:
        """Give the memory back."""
        self._arena.close()


def _stalled() -> StallError:
    return StallError(f"no shard of the optimizer's state was written for {STALL_S:.0f} s: is the drive still there?")


def arrays_of(raw: memoryview, shard: Shard, count: int) -> list[torch.Tensor]:
    """The arrays of a shard, [elements] each, as views of its bytes."""
    assert shard.array_nbytes % PAGE == 0
    return [
        torch.frombuffer(raw, dtype=torch.float32, count=shard.elements, offset=index * shard.array_nbytes)
        for index in range(count)
    ]
