"""Shards on their way from and to a block store: what is being written, in what order it lands, and what failed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from ...memory.arena import round_up
from ...memory.disk import DiskEngine, Transfer
from ...memory.errors import StallError
from ...memory.image import whole_window
from ...memory.layout import FileSpan
from ...memory.store import BlockStore, checksum
from .shards import Shard

STALL_S: Final = 120.0


class ShardFiles:
    """Reads and writes shards of a block store; block i is shard i.

    Args:
        store: Where they are.
        engine: Reads and writes.
    """

    def __init__(self, store: BlockStore, engine: DiskEngine) -> None:
        self._store = store
        self._engine = engine
        self.changed = threading.Condition()
        """Held to look at what changes, and notified after each change."""
        self._writing: set[int] = set()
        """Shards whose writes have not landed: what is on disk is older than what they hold."""
        self._landings = 0
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
        error = transfer.error
        if error is None and not transfer.cancelled:
            try:
                self._store.written(shard.id, found)
            except Exception as failure:  # it must surface where the work is done, not in a thread of the drive
                error = failure
        # Cancelled: the drive's threads are ended. The store is not told that it arrived, so no commit can have it.
        self._end(shard, error, landed)

    def _end(self, shard: Shard, error: Exception | None, landed: Callable[[], None]) -> None:
        if error is not None:
            self.abandon(shard, error)
        with self.changed:
            self._writing.discard(shard.id)
            self._landings += 1
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
            self.wait_for(lambda: self.failed or shard.id not in self._writing)
        self.raise_error()

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Wait with `changed` held. As long as writes land, nothing is stalled.

        Raises:
            StallError: none lands any more.
        """
        while not ready():
            seen = self._landings
            if not self.changed.wait_for(lambda: ready() or self._landings != seen, timeout=STALL_S):  # noqa: B023
                raise StallError(
                    f"no shard of the optimizer's state was written for {STALL_S:.0f} s: is the drive still there?"
                )

    def raise_error(self) -> None:
        """Raise what a write met."""
        if self._error is not None:
            raise self._error
