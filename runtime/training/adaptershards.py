"""Masters and optimizer states that stay in host memory: read once, changed there, written when a commit is made.

It does for adapters what `ShardPipeline` does for weights: a step moves no bytes, and a commit writes what has changed
since the one before, into the slots of the store that no commit names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...memory.arena import HostArena, round_up
from ...memory.disk import DiskEngine, Transfer
from ...memory.errors import StallError
from ...memory.image import whole_window
from ...memory.store import BlockStore, checksum
from .pipeline import STALL_S, Work, arrays_of
from .shards import Shard


class AdapterShards:
    """Carries work out on shards of a block store that are all in memory, from one thread at a time.

    Args:
        store: Where they are durable; block i is shard i.
        engine: Reads and writes.
        shards: All there are.
        arrays: How many each has.
    """

    def __init__(self, *, store: BlockStore, engine: DiskEngine, shards: Sequence[Shard], arrays: int) -> None:
        self._store = store
        self._engine = engine
        self._shards = shards
        self._arrays = arrays
        self._arena = HostArena(self.needed_nbytes(shards, arrays), tier="shards")
        self._slots = [self._arena.cut(arrays * shard.array_nbytes) for shard in shards]
        self._here: set[int] = set()
        """Shards that are in memory."""
        self._changed: set[int] = set()
        """Of these, the ones that the store has older bytes of, or none."""

    @staticmethod
    def needed_nbytes(shards: Sequence[Shard], arrays: int) -> int:
        """Host memory that it takes."""
        return sum(round_up(arrays * shard.array_nbytes) for shard in shards)

    def run(self, take: Callable[[], int | None], work: Work, *, new: bool = False, write: bool = True) -> None:
        """Work on shards until there are no more.

        Args:
            take: Gives the id of the next shard, or None where there is none now.
            work: What to do with each.
            new: They are not there yet: the arrays start as zeros.
            write: They are changed. Without, they are only looked at.

        Raises:
            PenstockError: a shard could not be read, or is damaged.
        """
        while (number := take()) is not None:
            shard = self._shards[number]
            raw = self._raw(shard)
            if new:
                raw[:] = bytes(len(raw))
            elif number not in self._here:
                self._read(shard, raw)
            self._here.add(number)
            if write:
                self._changed.add(number)
            work(shard, arrays_of(raw, shard, self._arrays))

    def write_out(self) -> None:
        """Write what has changed to the store, and wait until it is there: it is part of the next commit.

        Raises:
            PenstockError: a shard could not be written. The store stops; what was committed stays.
        """
        begun = [self._begin_write(self._shards[number]) for number in sorted(self._changed)]
        for number, found, transfer in begun:
            try:
                if not transfer.wait(STALL_S):
                    raise StallError(
                        f"shard {number} of the optimizer's state has not been written for {STALL_S:.0f} s: is the "
                        "drive still there?"
                    )
            except Exception as error:
                self._store.write_failed(number, error)
                raise
            self._store.written(number, found)
            self._changed.discard(number)

    def _raw(self, shard: Shard) -> memoryview:
        return self._arena.view(self._slots[shard.id].offset, self._arrays * shard.array_nbytes)

    def _read(self, shard: Shard, raw: memoryview) -> None:
        span = self._store.location(shard.id)
        window = whole_window(span.path, span.offset, round_up(span.nbytes))
        slot = self._slots[shard.id]
        self._engine.read([window], [], self._arena.view(slot.offset, slot.nbytes)).wait()
        self._store.check(shard.id, raw)

    def _begin_write(self, shard: Shard) -> tuple[int, int, Transfer]:
        """Number, checksum and handle of a write."""
        raw = self._raw(shard)
        found = checksum(raw)
        span = self._store.begin_write(shard.id)
        assert span is not None
        try:
            return shard.id, found, self._engine.write(span.path, span.offset, raw)
        except Exception as error:  # the drive's threads have been stopped, for one
            self._store.write_failed(shard.id, error)
            raise

    def close(self) -> None:
        """Give the memory back."""
        self._arena.close()
