"""The thread by which storages come back, in the order in which they were asked for; it reads ahead of that at hand."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...memory.arena import Slot, round_up
from ...memory.errors import ClosedError, CorruptBlockError, DiskError, PenstockError, StallError
from ...memory.image import whole_window
from ...memory.store.checksum import checksum
from ...memory.transfer import Transfer
from .hold import Hold, Piece, flat_of
from .leaving import GO_ON, lost

if TYPE_CHECKING:
    from .store import ActivationStore

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, eq=False)
class _Job:
    """A storage on its way back."""

    hold: Hold
    to_read: deque[Piece]
    """From disk, that have not been asked for."""
    reads: deque[tuple[Piece, Slot, Transfer]]
    """That have."""


class Returning:
    """Carries storages back.

    Args:
        store: Whose.
    """

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self._queue: queue.SimpleQueue[Hold | None] = queue.SimpleQueue()
        self._jobs: deque[_Job] = deque()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="penstock-activations-in", daemon=True)
        self._thread.start()

    def put(self, hold: Hold) -> None:
        """One more is wanted; its memory is made."""
        self._queue.put(hold)

    def _run(self) -> None:
        store = self._store
        while not self._ended or self._jobs:
            self._receive()
            if not self._jobs:
                continue
            job = self._jobs[0]
            try:
                self._read_ahead()
                self._carry(job)
            except Exception as error:  # whatever it is, it must reach who wants the storage
                self._give_up(job)
                store.lose(job.hold, error)
            self._jobs.popleft()
            store.came(job.hold)
            store.device.wait(job.hold.ready)  # the memory is ours until then, and what it was read from is in use
            store.free_pieces(job.hold)
            del job

    def _receive(self) -> None:
        """Take what is wanted; waits where there is nothing to do."""
        while True:
            try:
                hold = self._queue.get(block=not self._jobs and not self._ended)
            except queue.Empty:
                return
            if hold is None:
                self._ended = True
                return
            to_read = deque(piece for piece in hold.pieces if piece.place == "disk")
            self._jobs.append(_Job(hold=hold, to_read=to_read, reads=deque()))

    def _read_ahead(self) -> None:
        """Ask the drive for what there are buffers for: of the job at hand, then of those behind it."""
        store = self._store
        for job in self._jobs:
            if job.to_read and not self._landed(job):
                return
            while job.to_read:
                with store.changed:
                    buffer = store.in_buffers.popleft() if store.in_buffers else None
                if buffer is None:
                    return
                self._read(job, buffer)

    def _landed(self, job: _Job) -> bool:
        """Whether all that was written of it is there to be read."""
        with self._store.changed:
            return not job.hold.writes

    def _read(self, job: _Job, buffer: Slot) -> None:
        store, piece = self._store, job.to_read[0]
        nbytes = round_up(piece.nbytes)
        try:
            window = whole_window(piece.path, piece.offset, nbytes)
            transfer = store.engine.read([window], [], store.arena.view(buffer.offset, nbytes))
        except BaseException:
            store.give_buffer(store.in_buffers, buffer)
            raise
        job.to_read.popleft()
        job.reads.append((piece, buffer, transfer))

    def _carry(self, job: _Job) -> None:
        """Bring all of one back; returns when the last copy has been enqueued.

        Raises:
            PenstockError: some of it cannot be had.
        """
        store, hold = self._store, job.hold
        if store.stopped:
            raise ClosedError("the model was closed while activations of it were wanted; load it again")
        assert hold.storage is not None
        flat = flat_of(hold.storage)
        for piece in hold.pieces:
            if piece.place == "host":
                target = flat[piece.start : piece.start + piece.nbytes]
                hold.ready = store.device.copy_in(store.arena, piece.offset, target, hold.made)
                store.count("in", piece.nbytes)
        if job.to_read or job.reads:
            self._await_writes(job)
        while job.to_read or job.reads:
            if not self._ended:
                self._receive()  # what has come to be wanted meanwhile, so that the drive can begin with it
            self._read_ahead()
            piece, buffer, transfer = job.reads[0]
            try:
                store.watch.transfer(transfer, lambda: f"{store.name_of(hold)} is read back")
            except DiskError as error:
                raise lost(store.name_of(hold), error) from error
            self._check(hold, piece, buffer)
            target = flat[piece.start : piece.start + piece.nbytes]
            hold.ready = store.device.copy_in(store.arena, buffer.offset, target, hold.made)
            store.device.wait(hold.ready)
            job.reads.popleft()
            store.give_buffer(store.in_buffers, buffer)
            store.count("in", piece.nbytes)
            store.count("read", round_up(piece.nbytes))

    def _await_writes(self, job: _Job) -> None:
        """Wait until all of one is on disk."""
        store, hold = self._store, job.hold

        def once(seconds: float) -> bool:
            with store.changed:
                return store.changed.wait_for(lambda: not hold.writes or store.stopped, timeout=seconds)

        store.watch.wait(once, lambda: f"{store.name_of(hold)} waits for its own write")
        if store.stopped:
            raise ClosedError("the model was closed while activations of it were wanted; load it again")
        if hold.error is not None:
            raise hold.error

    def _check(self, hold: Hold, piece: Piece, buffer: Slot) -> None:
        """See that what was read is what was written."""
        store = self._store
        found = checksum(store.arena.view(buffer.offset, piece.nbytes))
        if found != piece.checksum:
            assert piece.checksum is not None
            raise CorruptBlockError(
                f"{store.name_of(hold)} is not what was written: {piece.nbytes} bytes at offset {piece.offset} of "
                f"{piece.path} have checksum {found:016x}, not {piece.checksum:016x}. {GO_ON}. If this "
                "happens again, look at the drive's health and at what else writes to that folder",
                block=hold.number,
                path=piece.path,
                offset=piece.offset,
                expected_checksum=piece.checksum,
                found_checksum=found,
            )

    def _give_up(self, job: _Job) -> None:
        """Let go of the buffers of one that cannot be had, once nothing is read into them any more."""
        store = self._store
        for _, buffer, transfer in job.reads:
            transfer.cancel()
            try:
                store.watch.transfer(transfer, lambda: "a read that is given up")
            except StallError:
                continue  # the drive may still write into it
            except PenstockError as error:
                logger.debug("a read that is given up: %s", error)
            store.give_buffer(store.in_buffers, buffer)
        job.reads.clear()
        job.to_read.clear()

    def join(self) -> None:
        """Wait for the thread to end: after what it is at."""
        self._queue.put(None)
        self._thread.join()
