"""Shards on their way from and to a block store: what is being written, in what order it lands, and what failed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from ...memory.arena import round_up
from ...memory.disk import DiskEngine
from ...memory.image import whole_window
from ...memory.layout import FileSpan
from ...memory.store import BlockStore, checksum
from ...memory.transfer import Transfer
from .shards import Shard
from .watch import STALL_S, WATCH_S, Watch, failure_of


class ShardFiles:
    """Reads and writes shards of a block store; block i is shard i.

    Args:
        store: Where they are.
        engine: Reads and writes.
        watch_s: How often a wait is reported.
        stall_s: How long one may last without a byte moved.
    """

    def __init__(
        self, store: BlockStore, engine: DiskEngine, *, watch_s: float = WATCH_S, stall_s: float = STALL_S
    ) -> None:
        self._store = store
        self._engine = engine
        self.changed = threading.Condition()
        """Held to look at what changes, and notified after each change."""
        self._writing: set[int] = set()
        """Shards whose writes have not landed: what is on disk is older than what they hold."""
        self.worked = 0
        """Shards that were worked on."""
        self.watch = Watch(self._moved, watch_s=watch_s, stall_s=stall_s)
        """For all waits of a training that end when shards move on."""
        self._error: Exception | None = None

    def read(self, shard: Shard, into: memoryview) -> Transfer:
        """Begin to read one, when its last write has landed.

        Raises:
            PenstockError: a write failed, or no state of it is in the store.
        """
        self.wait_landed(shard)
        span = self._store.location(shard.id)
        window = whole_window(span.path, span.offset, round_up(span.nbytes))
        return self._engine.read([window], [], into)

    def check(self, shard: Shard, raw: memoryview) -> None:
        """Compare what was read with what was written.

        Raises:
            CorruptBlockError: it is something else.
        """
        self._store.check(shard.id, raw)

    def begin(self, shard: Shard) -> FileSpan:
        """Say that one will be written: a commit from now on waits for it. `write` must follow.

        Raises:
            StoreError, StallError: see `BlockStore.begin_write`.
        """
        span = self._store.begin_write(shard.id)
        assert span is not None
        with self.changed:
            self._writing.add(shard.id)
        return span

    def write(self, shard: Shard, span: FileSpan, raw: memoryview, landed: Callable[[], None]) -> None:
        """Write one. `raw` must not change before `landed` is called, in whatever thread, also after an error."""
        try:
            found = checksum(raw)
            transfer = self._engine.write(span.path, span.offset, raw)
        except Exception as error:  # whoever waits for it, a commit for one, must learn of it
            self._end(shard, error, landed)
            raise
        transfer.add_done_callback(lambda done: self._landed(shard, done, found, landed))

    def _landed(self, shard: Shard, transfer: Transfer, found: int, landed: Callable[[], None]) -> None:
        error = failure_of(transfer)
        if error is None:
            try:
                self._store.written(shard.id, found)
            except Exception as failure:  # it must surface where the work is done, not in a thread of the drive
                error = failure
        self._end(shard, error, landed)

    def _end(self, shard: Shard, error: Exception | None, landed: Callable[[], None]) -> None:
        if error is not None:
            self.abandon(shard, error)
        with self.changed:
            self._writing.discard(shard.id)
            self.changed.notify_all()
        landed()

    def abandon(self, shard: Shard, error: Exception) -> None:
        """One that was begun will not be written. The store stops."""
        with suppress(Exception):  # it has stopped already, or was closed
            self._store.write_failed(shard.id, error)
        with self.changed:
            self._error = self._error or error
            self._writing.discard(shard.id)
            self.changed.notify_all()

    @property
    def failed(self) -> bool:
        """Whether a write did not arrive."""
        return self._error is not None

    def is_writing(self, shard: Shard) -> bool:
        """Whether a write of it has not landed."""
        return shard.id in self._writing

    def wait_landed(self, shard: Shard) -> None:
        """Wait until no write of it is under way: from then on what it was written from may change.

        Raises:
            PenstockError: a write failed.
            StallError: none lands any more.
        """
        with self.changed:
            self.wait_for(
                lambda: self.failed or shard.id not in self._writing, f"shard {shard.id} waits for its own write"
            )
        self.raise_error()

    def wait_for(self, ready: Callable[[], bool], what: str) -> None:
        """Wait with `changed` held. As long as anything moves, nothing is stalled.

        Raises:
            StallError: nothing moves any more.
        """
        self.watch.wait(lambda s: self.changed.wait_for(ready, timeout=s), lambda: f"{what}; {self.report()}")

    def _moved(self) -> int:
        statistics = self._engine.statistics()
        return statistics.read_nbytes + statistics.written_nbytes + self.worked

    def report(self) -> str:
        """What is being written, for who waits."""
        writing = ", ".join(str(number) for number in sorted(self._writing.copy())) or "none"
        folders = ", ".join(str(folder) for folder in self._store.folders)
        return f"shards being written to {folders}: {writing}"

    def raise_error(self) -> None:
        """Raise what a write met."""
        if self._error is not None:
            raise self._error
