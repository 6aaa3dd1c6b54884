"""Publishing cuts: in order, one at a time, in a thread that lives as long as there are any.

writes of the cut landed ► fdatasync of the data files ► manifest.new, fsync ► rename ► fsync of the folder
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from ..errors import ClosedError, StallError, StoreError
from .commit import REPORT_S, Commit
from .datafiles import DataFiles
from .files import StoreFiles
from .folder import MANIFEST, PREVIOUS, Found, publish_new, write_new
from .manifest import StoreFacts, pack_manifest
from .slots import Cut, Slots

logger = logging.getLogger(__name__)


class Publisher:
    """Owns what changes while a store is open: its slots, its newest commit, and whether it has failed.

    Everything here is read and changed with `changed` held, which is notified after each change.
    """

    def __init__(self, files: StoreFiles, facts: StoreFacts, data: DataFiles, found: Found, stall_s: float) -> None:
        manifest = found.manifest
        self._files = files
        self._facts = facts
        self._data = data
        self._stall_s = stall_s
        self._manifest_path = os.path.join(facts.folders[0], MANIFEST)
        self.changed = threading.Condition()
        self.slots = Slots(manifest.committed())
        self.published = manifest.commit
        self.metadata = manifest.metadata
        self.written_nbytes = manifest.written_nbytes + found.nbytes
        self.failure: StoreError | None = None
        """Why nothing can be written or published any more."""
        self.commits: list[Commit] = []
        """Handles of those under way, oldest first."""
        self._numbered = manifest.commit
        self._unsynced: set[int] = set()
        """Drives with writes that landed since their last fdatasync began."""
        self._landings = 0
        self._closing = False
        self._thread: threading.Thread | None = None

    def landed(self, block: int, checksum: int, nbytes: int) -> None:
        """A write of `nbytes` is over."""
        self.slots.landed(block, checksum)
        self._unsynced.add(self._facts.slotmap.homes[block].drive)
        self._landings += 1
        self.written_nbytes += nbytes
        self.changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Nothing goes on from here; the last commit stays."""
        if self.failure is None:
            self.failure = StoreError(
                f"the store in {self._facts.folders[0]} stopped after commit {self.published}: {error}. What was "
                f"written after that commit is lost: close the store, mend the cause, and go on from commit "
                f"{self.published}"
            )
            self.failure.__cause__ = error
        self.changed.notify_all()

    def reserve(self) -> Commit:
        """The handle of a commit that is to be submitted later, after all that are reserved before."""
        self._numbered += 1
        return Commit(self._numbered)

    def submit(self, metadata: bytes, reserved: Commit | None = None) -> Commit:
        """Cut now and publish soon."""
        commit = reserved or self.reserve()
        self.slots.cut(commit.number, metadata)
        self.commits.append(commit)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="penstock-store-commit", daemon=True)
            self._thread.start()
        return commit

    def wait_until(self, ready: Callable[[], bool], what: str, timeout: float | None = None) -> bool:
        """Wait with `changed` held; False after `timeout` seconds.

        Raises:
            StoreError: the store failed meanwhile, so that it would be in vain.
            ClosedError: it was closed meanwhile.
            StallError: there was no timeout, and nothing has landed for longer than any write takes.
        """
        started = time.monotonic()
        seen = self._landings
        limit = self._stall_s if timeout is None else timeout
        while not ready():
            if self.failure is not None:
                raise self.failure
            if self._closing:
                raise ClosedError(f"the block store was closed by another thread while this one waited for {what}")
            if timeout is None and self._landings != seen:
                seen, started = self._landings, time.monotonic()  # what it waits for may be long, but goes on
            passed = time.monotonic() - started
            if passed >= limit:
                if timeout is None:
                    raise StallError(f"waited {passed:.0f} s for {what} of the store in {self._facts.folders[0]}")
                return False
            if not self.changed.wait(min(REPORT_S, limit - passed)) and passed + REPORT_S < limit:
                logger.warning("still waiting after %.0f s: %s", time.monotonic() - started, what)
        return True

    def close(self) -> None:
        """Publish the cuts whose writes have landed, give up the others, end the thread."""
        with self.changed:
            self._closing = True
            self.changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def describe_writing(self) -> str:
        """Which blocks are being written, for messages."""
        labels = [self._facts.slotmap.label(block) for block in sorted(self.slots.writing)]
        return ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")

    def _run(self) -> None:
        while (cut := self._next()) is not None:
            error: Exception | None = None
            try:
                self._await_writes(cut)
                self._publish(cut)
            except Exception as failure:  # whatever it is, it must reach those who wait for the commit
                error = failure
                with self.changed:
                    self.slots.drop(cut)
                    self.changed.notify_all()
            self.commits[0].finish(error)
            with self.changed:
                del self.commits[0]
                self.changed.notify_all()

    def _next(self) -> Cut | None:
        with self.changed:
            if self.slots.cuts:
                return self.slots.cuts[0]
            self._thread = None
            return None

    def _await_writes(self, cut: Cut) -> None:
        with self.changed:
            seen, since = self._landings, time.monotonic()
            while cut.unlanded and self.failure is None:
                if self._closing:
                    raise ClosedError(
                        f"commit {cut.number} was given up: the store was closed while {self.describe_writing()} was "
                        "being written; wait for the commit before closing"
                    )
                if not self.changed.wait(min(REPORT_S, self._stall_s)) and self._landings == seen:
                    waited = time.monotonic() - since
                    logger.warning("commit %d waits for %s since %.0f s", cut.number, self.describe_writing(), waited)
                    if waited >= self._stall_s:
                        raise StallError(
                            f"commit {cut.number} was given up: {self.describe_writing()} is being written since "
                            f"{waited:.0f} s and nothing landed; look at the drive's health"
                        )
                if self._landings != seen:
                    seen, since = self._landings, time.monotonic()
            if self.failure is not None:
                raise self.failure

    def _publish(self, cut: Cut) -> None:
        with self.changed:
            drives, self._unsynced = sorted(self._unsynced), set()
            written_nbytes = self.written_nbytes
        try:
            self._data.sync(drives)
        except Exception as error:
            self._fail_locked(error)
            raise
        data = pack_manifest(self._facts.manifest(cut, written_nbytes))
        # A manifest that cannot be written (a full disk) costs this commit only: the blocks are where they were.
        write_new(self._files, self._manifest_path, data)
        try:
            publish_new(self._files, self._manifest_path, previous=os.path.join(self._facts.folders[0], PREVIOUS))
        except Exception as error:  # either manifest may be there after a power failure: no slot of both is free
            self._fail_locked(error)
            raise
        with self.changed:
            self.slots.publish(cut)
            self.published, self.metadata = cut.number, cut.metadata
            self.written_nbytes += len(data)
            self.changed.notify_all()

    def _fail_locked(self, error: Exception) -> None:
        with self.changed:
            self.fail(error)
