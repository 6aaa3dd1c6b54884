"""Shards that stay in host memory: no step reads or writes them, and a commit has those written that have changed."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Final

from ...memory.arena import HostArena, Slot
from ...memory.errors import ClosedError, StallError
from ...memory.layout import FileSpan
from .shardfiles import ShardFiles
from .shards import Shard

logger = logging.getLogger(__name__)
MakeArena = Callable[[int, str], HostArena]
"""Makes host memory of so many bytes, to be called so in errors."""
AT_ONCE: Final = 3
"""Shards that a commit has under way: reads of weights must not wait behind gigabytes of states."""


class ResidentShards:
    """The shards that stay, and their writing.

    A commit's writes read the very memory that the next step changes: `wait_unwritten` comes before any change. They
    are written in the order in which the steps before have changed them, and those that updates have come to first.

    Args:
        files: Where they are written.
        shards: All there are.
        kept: The numbers of those that stay.
        arrays: How many each has.
        make_arena: Makes the memory.
    """

    def __init__(
        self, files: ShardFiles, shards: Sequence[Shard], kept: Collection[int], arrays: int, make_arena: MakeArena
    ) -> None:
        self._files = files
        self._shards = [shard for shard in shards if shard.id in kept]
        self._sizes = {shard.id: arrays * shard.array_nbytes for shard in self._shards}
        self.arena = make_arena(sum(self._sizes.values()), "states") if self._shards else None
        self._slots: dict[int, Slot] = {}
        if self.arena is not None:
            self._slots = {shard.id: self.arena.cut(self._sizes[shard.id]) for shard in self._shards}
        self._loaded: set[int] = set()
        self._dirty: dict[int, Shard] = {}
        """What the store does not have, in the order in which it was changed."""
        self._left: deque[tuple[Shard, FileSpan]] = deque()
        """What a commit is to write and has not begun to."""
        self._hurried: deque[tuple[Shard, FileSpan]] = deque()
        """Likewise, and steps wait for it, or soon will."""
        self._lock = threading.Lock()
        """Of both."""
        self._thread: threading.Thread | None = None

    def __contains__(self, shard: Shard) -> bool:
        """Whether it stays."""
        return shard.id in self._sizes

    def view(self, shard: Shard) -> memoryview:
        """Its bytes."""
        assert self.arena is not None
        return self.arena.view(self._slots[shard.id].offset, self._sizes[shard.id])

    def has(self, shard: Shard) -> bool:
        """Whether its bytes are there."""
        return shard.id in self._loaded

    def loaded(self, shard: Shard) -> None:
        """They are, as the store has them."""
        self._loaded.add(shard.id)

    def changed(self, shard: Shard) -> None:
        """They are, and the store has others."""
        self._loaded.add(shard.id)
        self._dirty.setdefault(shard.id, shard)

    def hurry(self, shard: Shard) -> None:
        """It will be changed soon: a commit that has not begun to write it does so before all that nobody asked for."""
        with self._lock:
            mine = next((each for each in self._left if each[0] is shard), None)
            if mine is not None:
                self._left.remove(mine)
                self._hurried.append(mine)

    def wait_unwritten(self, shard: Shard) -> None:
        """Wait until its bytes may change: for its own write.

        Raises:
            PenstockError: a write failed.
            StallError: nothing is written any more.
        """
        self._files.wait_landed(shard)

    def write_out(self) -> None:
        """Begin to write what the store does not have: a commit that is cut after this returns has it, as it is now.

        No shard may be at work. Waits for a publication under way where both places of a shard are needed by commits.

        Raises:
            PenstockError: the store stopped, or an earlier write failed.
        """
        self._files.raise_error()
        if not self._dirty:
            return
        self.join()  # all that it writes has begun, so this takes as long as the last few
        begun: list[tuple[Shard, FileSpan]] = []
        try:
            for shard in self._dirty.values():
                begun.append((shard, self._files.begin(shard)))
            self._left.extend(begun)
            thread = threading.Thread(target=self._write, name="penstock-write-out", daemon=True)
            thread.start()
        except BaseException as error:  # an interrupt, too, must not leave shards that nobody writes
            reason = error if isinstance(error, Exception) else ClosedError("a commit was interrupted")
            self._left.clear()
            for shard, _ in begun:
                self._files.abandon(shard, reason)
            raise
        self._dirty.clear()
        self._thread = thread

    def _write(self) -> None:
        places = threading.Semaphore(AT_ONCE)
        while self._unbegun():
            places.acquire()
            with self._lock:
                shard, span = (self._hurried or self._left).popleft()
            try:
                self._files.raise_error()
                self._files.write(shard, span, self.view(shard), places.release)
            except Exception as error:  # it is raised where the work is done; what was not written goes the same way
                with self._lock:
                    others = [other for other, _ in (*self._hurried, *self._left)]
                    self._hurried.clear()
                    self._left.clear()
                for other in (shard, *others):
                    self._files.abandon(other, error)
                return

    def _unbegun(self) -> int:
        """How many shards a commit is still to begin to write."""
        with self._lock:
            return len(self._left) + len(self._hurried)

    def join(self) -> None:
        """Wait until all that was to be written is under way, or has failed.

        Raises:
            StallError: nothing moves any more.
        """
        thread = self._thread
        if thread is None:
            return

        def ended(seconds: float) -> bool:
            thread.join(seconds)
            return not thread.is_alive()

        self._files.watch.wait(
            ended, lambda: f"{self._unbegun()} shards of a commit wait to be written; {self._files.report()}"
        )
        self._thread = None

    def settle(self) -> None:
        """Wait until it has landed, too; at the end, before the drive's threads are stopped. Failures are the commit's.

        Raises:
            StallError: nothing lands any more.
        """
        self.join()
        with self._files.changed:
            self._files.wait_for(
                lambda: not any(self._files.is_writing(shard) for shard in self._shards),
                "shards of a commit are to land",
            )

    def close(self) -> None:
        """Give the memory back, unless a drive that hangs may still read it."""
        try:
            self.join()
        except StallError as error:
            logger.warning("%s", error)
            return
        if self.arena is not None:
            self.arena.close()
