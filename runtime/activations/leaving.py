"""The thread by which storages leave: copied to host memory, or into buffers from which the disk engine writes."""

from __future__ import annotations

import queue
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Final

from ...memory.arena import Slot, round_up
from ...memory.errors import DiskError
from ...memory.store.checksum import checksum
from ...memory.transfer import Transfer
from ..training.watch import failure_of
from .hold import Hold, Piece, Where, flat_of

if TYPE_CHECKING:
    from .store import ActivationStore


class Leaving:
    """Carries storages out, in the order in which they were sent.

    Args:
        store: Whose.
    """

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self._queue: queue.SimpleQueue[weakref.ref[Hold] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="penstock-activations-out", daemon=True)
        self._thread.start()

    def put(self, hold: Hold) -> None:
        """One more is to leave. Nobody here keeps it alive until then."""
        self._queue.put(weakref.ref(hold))

    def _run(self) -> None:
        store = self._store
        while (reference := self._queue.get()) is not None:
            hold = reference()
            if hold is None:
                store.clear_forgotten()
                continue
            self._let_go(hold)
            del hold  # a thread that waits for the next one keeps none alive

    def _let_go(self, hold: Hold) -> None:
        store = self._store
        with store.changed:
            if hold.where is not Where.QUEUED or store.stopped:
                return
            hold.where = Where.LEAVING
        try:
            self._carry(hold)
        except Exception as error:  # whatever it is, it must reach who wants the storage
            store.lose(hold, error)
        store.left(hold)

    def _carry(self, hold: Hold) -> None:
        for piece in hold.pieces:
            if self._store.stopped:
                return
            if piece.place == "host":
                self._copy(hold, piece, piece.offset)
            elif piece.place == "disk":
                self._write(hold, piece)

    def _copy(self, hold: Hold, piece: Piece, offset: int) -> None:
        """To the arena. Returns when the copy has passed."""
        store = self._store
        assert hold.storage is not None
        source = flat_of(hold.storage)[piece.start : piece.start + piece.nbytes]
        store.device.wait(store.device.copy_out(source, store.arena, offset, hold.made))
        store.count("out", piece.nbytes)

    def _write(self, hold: Hold, piece: Piece) -> None:
        """Into a buffer, and from there to the file. Returns when the copy has passed."""
        store = self._store
        buffer = store.take_buffer(store.out_buffers)
        if buffer is None:
            return
        try:
            self._copy(hold, piece, buffer.offset)
            piece.checksum = checksum(store.arena.view(buffer.offset, piece.nbytes))
            transfer = store.engine.write(
                piece.path, piece.offset, store.arena.view(buffer.offset, round_up(piece.nbytes))
            )
        except Exception as error:
            store.give_buffer(store.out_buffers, buffer)
            raise lost(store.name_of(hold), error) from error
        store.begin_write(hold)
        transfer.add_done_callback(partial(self._landed, hold, piece, buffer))

    def _landed(self, hold: Hold, piece: Piece, buffer: Slot, transfer: Transfer) -> None:
        """Called by an I/O thread."""
        store = self._store
        error = failure_of(transfer)
        if error is None:
            store.count("written", round_up(piece.nbytes))
        else:
            store.lose(hold, lost(store.name_of(hold), error))
        store.landed(hold, buffer)

    def join(self) -> None:
        """Wait for the thread to end: after what it is at."""
        self._queue.put(None)
        self._thread.join()


GO_ON: Final = (
    'The weights are as they were: call zero_grad() and take the batch again. With updates="backward" some of them '
    "may have been updated: then go on from the last commit with penstock.resume"
)


def lost(name: str, error: Exception) -> Exception:
    """What a drive met, as whoever wants the storage is told of it."""
    if not isinstance(error, DiskError):
        return error
    return DiskError(
        f"{name} is lost, which went through the run's scratch folder: {error}. {GO_ON}. Or keep activations in "
        'memory: give more of it, or say activations="recompute"'
    )
