"""Storages that leave the memory that computes, and come back: to an arena in host memory, and to a scratch file.

Each has one thread per direction, which waits for copies where nobody else waits. What it reads or writes there:

* Out: the copy waits for the event after which the storage is whole; the storage is let go of when the copy has passed.
* In: new memory is made in the consumer's thread; the copy waits for an event after that, since the memory may be one
  that kernels under way still read. The consumer waits until the last copy is enqueued, then for its event.
* What goes to disk passes through buffers, a few each way. One is used again after the write, or after the copy out of
  it. Every piece has a checksum, which is compared when it comes back.

Who asks for a storage that has not left gets it as it is, and it does not leave. Each moves at most once each way.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final

import torch

from ...memory.arena import Slot, debug_enabled
from ...memory.disk import DiskEngine
from ...memory.errors import ClosedError
from ...scheduler.activations import Part
from ..devices.base import Device
from ..training.watch import STALL_S, WATCH_S, Watch
from .hold import Hold, Piece, Where, flat_of
from .leaving import Leaving
from .places import ActivationPlaces
from .returning import Returning
from .statistics import StoreStatistics

BUFFERS: Final = 4
"""Each way."""
LEAST_BUFFER: Final = 64 << 10
LEAVING: Final = 64 << 20
"""Bytes that may be on their way out before forward waits for them, unless the buffers alone are more."""
MOST_BUFFER: Final = 4 << 20
"""As long as one request of the disk engine: longer ones would not be faster."""


class ActivationStore:
    """A place for storages.

    Args:
        device: That computes.
        engine: Reads and writes.
        host_nbytes: Of the arena; 0 for none, as where the CPU computes.
        buffer_nbytes: Of each of the buffers on the way to disk; 0 where nothing goes there.
        paths: Scratch files, one per drive; storages take turns.
        keep_nbytes: That may stay in the memory that computes by the plan; None where there is no limit.
        leaving_nbytes: That may be on their way out before who sends more has to wait: until then they are still there.
    """

    def __init__(
        self,
        *,
        device: Device,
        engine: DiskEngine,
        host_nbytes: int,
        buffer_nbytes: int,
        paths: Sequence[str],
        leaving_nbytes: int,
        keep_nbytes: int | None = None,
        watch_s: float = WATCH_S,
        stall_s: float = STALL_S,
    ) -> None:
        self.device = device
        self.engine = engine
        self.changed = threading.Condition()
        self.arena = device.host_arena(host_nbytes + 2 * BUFFERS * buffer_nbytes)
        self._places = ActivationPlaces(
            self.arena, host_nbytes=host_nbytes, piece_nbytes=buffer_nbytes, paths=paths if buffer_nbytes else ()
        )
        if host_nbytes:
            self.arena.cut(host_nbytes)
        self.out_buffers, self.in_buffers = (
            deque(self.arena.cut(buffer_nbytes) for _ in range(BUFFERS if buffer_nbytes else 0)) for _ in range(2)
        )
        self._keep_limit = keep_nbytes
        self._kept = 0
        self._forgotten: deque[tuple[Sequence[Piece], int, int]] = deque()
        self._limit = leaving_nbytes
        self.leaving_nbytes = 0
        """Of storages that are still there."""
        self.counts: Counter[str] = Counter()
        self.waited_s = 0.0
        """That forwards and backwards have waited for storages."""
        self._number = 0
        self.stopped = False
        self.failure: Exception | None = None
        """Of this forward, that nobody has been told of."""
        self._forward = 0
        self.watch = Watch(lambda: self.counts["moves"], watch_s=watch_s, stall_s=stall_s)
        self._leaving = Leaving(self)
        self._returning = Returning(self)

    @staticmethod
    def buffers_nbytes(each: int) -> int:
        """What all buffers take, of so many bytes each."""
        return 2 * BUFFERS * each

    # --- from whoever computes ----------------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """What is sent from now on is of another forward: what befell storages of those before concerns only them."""
        with self.changed:
            self._forward += 1
            self.failure = None

    def send(self, storage: torch.UntypedStorage, parts: Sequence[Part], *, label: str) -> Hold | None:
        """Take a storage that is whole behind what the caller's stream holds now. It begins to leave.

        Args:
            storage: Which nobody will change any more.
            parts: Where its bytes go, in order.
            label: What saved it, for messages.

        Returns:
            None where a place has no room: host memory none in one piece, or there are no buffers to disk.

        Raises:
            DiskError: one that was sent before in this forward could not be written; it is raised once.
            StallError: storages that were sent before do not leave.
        """
        if any(part.place != "keep" for part in parts):  # these are there until they have left
            self._await(lambda: self._fits(storage.nbytes()), lambda: f"{label} waits for what it saved to leave")
        with self.changed:
            if (failure := self.failure) is not None:
                self.failure = None
                raise failure
            self._clear_forgotten()
            kept = sum(part.nbytes for part in parts if part.place == "keep")
            if self._keep_limit is not None and kept and self._kept + kept > self._keep_limit:
                return None
            if kept == storage.nbytes():
                self._kept += kept
                return self._new(storage, label, kept)
            pieces = self._places.take(storage, parts)
            if pieces is None:
                return None
            self._kept += kept
            hold = self._new(storage, label, kept)
            hold.pieces = pieces
            hold.where, hold.made = Where.QUEUED, self.device.computed()
            self.leaving_nbytes += hold.nbytes
            self.counts["sent"] += 1
        self._leaving.put(hold)
        return hold

    def keep(self, storage: torch.UntypedStorage, *, label: str) -> Hold:
        """Take one that stays and counts nowhere: small ones, and what has to be somewhere."""
        with self.changed:
            return self._new(storage, label, 0)

    def _new(self, storage: torch.UntypedStorage, label: str, kept: int) -> Hold:
        self._number += 1
        return Hold(
            store=self,
            nbytes=storage.nbytes(),
            number=self._number,
            forward=self._forward,
            storage=storage,
            kept_nbytes=kept,
            label=label,
        )

    def _fits(self, nbytes: int) -> bool:
        self._clear_forgotten()
        return not self.leaving_nbytes or self.leaving_nbytes + nbytes <= self._limit or self.failure is not None

    def bring(self, hold: Hold, *, ahead: bool) -> None:
        """Have one back soon, or keep it from leaving. Memory for it is made here, in the thread that will use it.

        Args:
            hold: Which.
            ahead: Whether that is before it is used.
        """
        with self.changed:
            if hold.where is Where.QUEUED:
                self._stays(hold)
            elif hold.where is Where.LEAVING:
                hold.wanted = True
            if hold.where is not Where.AWAY:
                return
            hold.where = Where.COMING
            if not ahead:
                self.counts["on demand"] += 1
        with torch.inference_mode(False):
            hold.storage = torch.empty(
                hold.nbytes, dtype=torch.uint8, device=self.device.torch_device
            ).untyped_storage()
        flat = flat_of(hold.storage)
        for piece in hold.pieces:
            if piece.kept is not None:
                flat[piece.start : piece.start + piece.nbytes].copy_(piece.kept)
                piece.kept = None
        hold.made = self.device.computed()
        self._returning.put(hold)

    def storage_of(self, hold: Hold) -> torch.UntypedStorage:
        """The bytes of one, which the caller's stream may use; waits until they are there.

        Raises:
            DiskError: it could not be written, or not be read back.
            CorruptBlockError: what was read back is not what was written.
            StallError: nothing moved for too long.
        """
        self.bring(hold, ahead=False)
        there = (Where.HERE, Where.LEAVING, Where.LOST)
        self._await(lambda: hold.where in there, lambda: f"backward waits for {self.name_of(hold)}")
        with self.changed:
            if hold.where is Where.LOST:
                assert hold.error is not None
                if self.failure is hold.error:
                    self.failure = None
                raise hold.error
        self.device.compute_waits(hold.ready)
        assert hold.storage is not None
        return hold.storage

    def name_of(self, hold: Hold) -> str:
        """For messages."""
        return f"activation {hold.number} of {hold.label} ({hold.nbytes} bytes)"

    def _await(self, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        def once(seconds: float) -> bool:
            with self.changed:
                return self.changed.wait_for(lambda: self.stopped or ready(), timeout=seconds)

        with self.changed:
            if ready() and not self.stopped:
                return
        begun = time.perf_counter()
        self.watch.wait(once, what)
        self.waited_s += time.perf_counter() - begun
        if self.stopped:
            raise ClosedError("the model was closed while activations of it were wanted; load it again")

    # --- from the threads that move -----------------------------------------------------------------------------------

    def left(self, hold: Hold) -> None:
        """All copies out of a storage have passed; its writes may be under way."""
        with self.changed:
            self.leaving_nbytes -= hold.nbytes
            self.counts["moves"] += 1
            if hold.wanted:
                self._settle_here(hold)
            else:
                hold.where, hold.storage = Where.AWAY, None
            self.changed.notify_all()

    def _stays(self, hold: Hold) -> None:
        """One that was to leave does not; under the lock."""
        self.leaving_nbytes -= hold.nbytes
        self._settle_here(hold)
        self.changed.notify_all()

    def _settle_here(self, hold: Hold) -> None:
        hold.where = Where.HERE
        if self.failure is hold.error:
            self.failure = None
        hold.error = None  # it is whole, whatever became of the copy
        self.counts["stayed"] += 1
        if not hold.writes:
            self._drop_pieces(hold)

    def lose(self, hold: Hold, error: Exception) -> None:
        """One could not be written or read back: who wants it is told, or who sends the next one."""
        with self.changed:
            if hold.where is not Where.HERE:  # else it is whole where it is used
                hold.error = hold.error or error
                if hold.forward == self._forward:
                    self.failure = self.failure or hold.error
            self.counts["moves"] += 1
            self.changed.notify_all()

    def begin_write(self, hold: Hold) -> None:
        """One that is about to land."""
        with self.changed:
            hold.writes += 1

    def count(self, what: str, nbytes: int) -> None:
        """Note that bytes have moved."""
        with self.changed:
            self.counts[what] += nbytes
            self.counts["moves"] += 1

    def landed(self, hold: Hold, buffer: Slot) -> None:
        """A write is over, and its buffer free."""
        self.give_buffer(self.out_buffers, buffer)
        with self.changed:
            hold.writes -= 1
            if not hold.writes and hold.where is Where.HERE:
                self._drop_pieces(hold)

    def came(self, hold: Hold) -> None:
        """Its last copy has been enqueued."""
        with self.changed:
            hold.where = Where.LOST if hold.error is not None else Where.HERE
            self.counts["returned"] += 1
            self.counts["moves"] += 1
            self.changed.notify_all()

    def free_pieces(self, hold: Hold) -> None:
        """What it had in host memory and on disk is read and can be used again."""
        with self.changed:
            self._drop_pieces(hold)

    def take_buffer(self, pool: deque[Slot]) -> Slot | None:
        """One that is free; waits for it. None where the store was stopped."""
        with self.changed:
            self.changed.wait_for(lambda: bool(pool) or self.stopped)
            return pool.popleft() if pool and not self.stopped else None

    def give_buffer(self, pool: deque[Slot], buffer: Slot) -> None:
        """One is free again."""
        if debug_enabled():
            self.arena.poison(buffer)
        with self.changed:
            pool.append(buffer)
            self.counts["moves"] += 1
            self.changed.notify_all()

    def _drop_pieces(self, hold: Hold) -> None:
        pieces, hold.pieces = hold.pieces, ()
        self._places.give(pieces)

    def forget(self, pieces: Sequence[Piece], leaving_nbytes: int, kept_nbytes: int) -> None:
        """Called when nobody has a storage any more, in any thread and at any moment: so no lock is taken."""
        self._forgotten.append((pieces, leaving_nbytes, kept_nbytes))

    def clear_forgotten(self) -> None:
        """Use again what such storages had."""
        with self.changed:
            self._clear_forgotten()
            self.changed.notify_all()

    def _clear_forgotten(self) -> None:
        while self._forgotten:
            pieces, leaving, kept = self._forgotten.popleft()
            self.leaving_nbytes -= leaving
            self._kept -= kept
            self._places.give(pieces)

    # --- the end ------------------------------------------------------------------------------------------------------

    def statistics(self) -> StoreStatistics:
        """A frozen record."""
        with self.changed:
            self._clear_forgotten()
            host = self._places.host_statistics()
            return StoreStatistics(
                out_nbytes=self.counts["out"],
                in_nbytes=self.counts["in"],
                written_nbytes=self.counts["written"],
                read_nbytes=self.counts["read"],
                sent=self.counts["sent"],
                returned=self.counts["returned"],
                stayed=self.counts["stayed"],
                on_demand=self.counts["on demand"],
                kept_nbytes=self._kept,
                host_nbytes=host.used_nbytes,
                host_peak_nbytes=host.peak_nbytes,
                file_nbytes=self._places.file_nbytes(),
            )

    def stop(self) -> None:
        """Let what is under way end, and the threads with it; who waits gets `ClosedError`. May be called twice."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
        self._leaving.join()
        self._returning.join()

    def close(self) -> None:
        """Give the memory back, once the engine has been closed."""
        self.arena.close()
