"""Gradients on their way from a device apart to host memory, while backward goes on.

Nobody waits for a copy but those who need what it brings. Backward enqueues it behind what made the gradient and goes
on; a thread waits on the host for one copy after the other, and does what is to be done with its gradient there.

Ordering. The copy waits for the compute stream (`Device.send`). Memory of the device: a gradient is held here, so that
the allocator gives it to nobody; once more than some bytes are held, the compute stream is made to wait for the oldest
copy and that gradient is let go, so that whatever is computed into its memory comes after the copy. The host does not
wait for that. Memory of the host: a place is read only after a wait on the copy into it, and places of the ring are
given out again once that and the work on them is over.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Final

import torch

from ...memory.arena import PAGE, round_up
from ...memory.errors import ClosedError, StallError
from ...scheduler.mover import Event
from ..devices.base import Device

HELD_NBYTES: Final = 64 << 20
"""Of gradients on the device that may wait for their copies; one larger one may all the same."""
STALL_S: Final = 120.0

Work = Callable[[torch.Tensor], None]
"""Takes a gradient in, flat and in host memory, from a thread of its own."""


class ByteRing:
    """Pieces of one arena, given back in the order in which they were taken.

    Args:
        nbytes: Of the arena; no piece is larger.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._taken: deque[tuple[int, int]] = deque()
        """Start and end of each piece, the oldest first."""
        self._changed = threading.Condition()

    def take(self, nbytes: int, *, timeout_s: float) -> int | None:
        """Where the next piece starts, as soon as it is free; None where nothing was given back for so long."""
        assert nbytes <= self._nbytes, (nbytes, self._nbytes)
        with self._changed:
            while (start := self._fits(nbytes)) is None:
                if not self._changed.wait(timeout_s):
                    return None
            self._taken.append((start, start + nbytes))
            return start

    def _fits(self, nbytes: int) -> int | None:
        if not self._taken:
            return 0
        oldest, end = self._taken[0][0], self._taken[-1][1]
        if end > oldest:  # free: behind the last, and before the oldest
            if end + nbytes <= self._nbytes:
                return end
            return 0 if nbytes <= oldest else None
        return end if end + nbytes <= oldest else None

    def give_back(self) -> None:
        """The oldest piece is free."""
        with self._changed:
            self._taken.popleft()
            self._changed.notify_all()


class Departures:
    """The copies, and what follows them.

    Args:
        device: Where gradients are made; one apart from the host.
        ring_nbytes: Pinned host memory for those that are not copied to where they stay; the largest of these has to
            fit. 0 if there are none.
        held_nbytes: Of device memory that may wait for copies.
    """

    def __init__(self, device: Device, *, ring_nbytes: int, held_nbytes: int = HELD_NBYTES) -> None:
        self._device = device
        self._held_nbytes = held_nbytes
        self._held: deque[tuple[torch.Tensor, Event]] = deque()
        self._ring = ByteRing(round_up(ring_nbytes))
        self.arena = device.host_arena(ring_nbytes, tier="gradients on their way") if ring_nbytes else None
        self._latest: dict[int, Future[None]] = {}
        """By parameter."""
        self._queue: queue.SimpleQueue[tuple[Future[None], Event, Callable[[], None]] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="penstock-gradients", daemon=True)
        self._thread.start()

    # --- called by backward -------------------------------------------------------------------------------------------

    def send(self, index: int, flat: torch.Tensor, target: torch.Tensor) -> None:
        """Copy the gradient of a parameter to where it stays.

        Raises:
            Exception: what an earlier one met. All gradients of the step are worth nothing.
        """
        self._raise_error()
        self._hand_over(index, self._copy(flat, target), lambda: None)

    def through(self, index: int, flat: torch.Tensor, work: Work) -> None:
        """Copy it to the ring, and have it taken in from there. Raises as `send` does, or StallError."""
        self._raise_error()
        assert self.arena is not None
        nbytes = round_up(flat.nbytes, PAGE)
        start = self._ring.take(nbytes, timeout_s=STALL_S)
        if start is None:
            raise StallError(f"a gradient waits for room: no other one left for {STALL_S:.0f} s; is the drive there?")
        values = torch.frombuffer(self.arena.view(start, flat.nbytes), dtype=flat.dtype)

        def take_in() -> None:
            try:
                if self._error is None:  # what it adds to is lost otherwise
                    work(values)
            finally:
                self._ring.give_back()

        self._hand_over(index, self._copy(flat, values), take_in)

    def _copy(self, flat: torch.Tensor, target: torch.Tensor) -> Event:
        event = self._device.send(flat, target)
        self._held.append((flat, event))
        held = sum(each.nbytes for each, _ in self._held)
        while len(self._held) > 1 and held > self._held_nbytes:
            oldest, copied = self._held.popleft()
            self._device.compute_waits(copied)
            held -= oldest.nbytes
        return event

    def _hand_over(self, index: int, event: Event, work: Callable[[], None]) -> None:
        arrival: Future[None] = Future()
        self._latest[index] = arrival
        self._queue.put((arrival, event, work))

    # --- called by whoever needs them ---------------------------------------------------------------------------------

    def wait(self, index: int) -> None:
        """Wait until the gradient of a parameter is there, if one was sent.

        Raises:
            Exception: what came in its way.
            StallError: it does not come.
        """
        arrival = self._latest.get(index)
        if arrival is None:
            return
        try:
            arrival.result(timeout=STALL_S)
        except FutureTimeoutError:
            if not arrival.done():
                raise StallError(f"a gradient did not leave the device for {STALL_S:.0f} s") from None
            arrival.result()

    def settle(self) -> None:
        """Wait until all of them are there.

        Raises:
            Exception: what the first one met. All are worth nothing.
        """
        self._settle()
        self._raise_error()

    def _settle(self) -> None:
        for index in list(self._latest):
            try:
                self.wait(index)
            except Exception as error:
                if error is not self._error:  # that is raised by whoever wants to know
                    raise
        self._latest.clear()
        self._held.clear()  # their copies have passed

    def forget(self) -> None:
        """Nothing of them is wanted any more, what failed included."""
        self._settle()
        self._error = None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            arrival, event, work = item
            try:
                self._device.wait(event)
                work()
                if self._error is not None:
                    raise self._error
            except Exception as error:  # it must surface where gradients are wanted, and free whoever waits
                self._error = self._error or error
                arrival.set_exception(error)
            else:
                arrival.set_result(None)

    def close(self) -> None:
        """End the thread and give the memory back. What was enqueued to the device has been carried out."""
        self._error = self._error or ClosedError("the model was closed while gradients were on their way")
        self._queue.put(None)
        self._thread.join()
        self._held.clear()
        if self.arena is not None:
            self.arena.close()
