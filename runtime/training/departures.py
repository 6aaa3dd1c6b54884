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
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from ...memory.arena import PAGE, round_up
from ...memory.errors import ClosedError
from ...scheduler.mover import Event
from ..devices.base import Device
from .watch import STALL_S, WATCH_S, Watch

HELD_NBYTES: Final = 64 << 20
"""Of gradients on the device that may wait for their copies; one larger one may all the same."""

Work = Callable[[torch.Tensor], None]
"""Takes a gradient in, flat and in host memory, from a thread of its own."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Leaving:
    """One on its way."""

    arrival: Future[None]
    event: Event
    """Of its copy."""
    work: Callable[[], None] | None
    """To be done when it is there."""
    ringed: bool
    """Whether it passes through the ring, and its piece is given back then."""


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

    def take_back(self) -> None:
        """The latest piece is not used."""
        with self._changed:
            self._taken.pop()
            self._changed.notify_all()

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
        names: Of the parameters, to be told of.
        moved: Grows while a drive moves what they wait for.
        held_nbytes: Of device memory that may wait for copies.
        watch_s: How often a wait is reported.
        stall_s: How long one may last without anything moved.
    """

    def __init__(
        self,
        device: Device,
        *,
        ring_nbytes: int,
        names: Sequence[str] = (),
        moved: Callable[[], int] = lambda: 0,
        held_nbytes: int = HELD_NBYTES,
        watch_s: float = WATCH_S,
        stall_s: float = STALL_S,
    ) -> None:
        self._device = device
        self._names = names
        self._held_nbytes = held_nbytes
        self._held: deque[tuple[torch.Tensor, Event]] = deque()
        self._ring = ByteRing(round_up(ring_nbytes))
        self.arena = device.host_arena(ring_nbytes, tier="gradients on their way") if ring_nbytes else None
        self._latest: dict[int, Future[None]] = {}
        """By parameter."""
        self._queue: queue.SimpleQueue[_Leaving | None] = queue.SimpleQueue()
        self._sent = self._gone = 0
        self._watch = Watch(lambda: self._gone + moved(), watch_s=watch_s, stall_s=stall_s)
        self._error: Exception | None = None
        self.waited_s = 0.0
        """That the thread which trains has waited for room, and for all to be there."""
        self._thread = threading.Thread(target=self._run, name="penstock-gradients", daemon=True)
        self._thread.start()

    # --- called by backward -------------------------------------------------------------------------------------------

    def send(self, index: int, flat: torch.Tensor, target: torch.Tensor) -> None:
        """Copy the gradient of a parameter to where it stays.

        Raises:
            Exception: what an earlier one met. All gradients of the step are worth nothing.
        """
        self._raise_error()
        self._hand_over(index, self._copy(flat, target), None)

    def through(self, index: int, flat: torch.Tensor, work: Work) -> None:
        """Copy it to the ring, and have it taken in from there. Raises as `send` does, or StallError."""
        self._raise_error()
        assert self.arena is not None
        start = self._room(index, round_up(flat.nbytes, PAGE))
        try:
            values = torch.frombuffer(self.arena.view(start, flat.nbytes), dtype=flat.dtype)
            event = self._copy(flat, values)
        except BaseException:
            self._ring.take_back()
            raise
        self._hand_over(index, event, lambda: work(values), ringed=True)

    def then(self, index: int, work: Callable[[], None]) -> None:
        """Have something done with one that was sent, once it is there. Raises as `send` does."""
        self._raise_error()
        self._hand_over(index, None, work)

    def _room(self, index: int, nbytes: int) -> int:
        """Where there is room in the ring, as soon as there is."""
        found: int | None = None

        def once(seconds: float) -> bool:
            nonlocal found
            found = self._ring.take(nbytes, timeout_s=seconds)
            return found is not None

        with self._waiting():
            self._watch.wait(once, lambda: f"{self._label(index)} waits for room; {self._report()}")
        assert found is not None
        return found

    def _copy(self, flat: torch.Tensor, target: torch.Tensor) -> Event:
        event = self._device.send(flat, target)
        self._held.append((flat, event))
        held = sum(each.nbytes for each, _ in self._held)
        while len(self._held) > 1 and held > self._held_nbytes:
            oldest, copied = self._held.popleft()
            self._device.compute_waits(copied)
            held -= oldest.nbytes
        return event

    def _hand_over(self, index: int, event: Event, work: Callable[[], None] | None, *, ringed: bool = False) -> None:
        arrival: Future[None] = Future()
        self._latest[index] = arrival
        self._sent += 1
        self._queue.put(_Leaving(arrival=arrival, event=event, work=work, ringed=ringed))

    # --- called by whoever needs them ---------------------------------------------------------------------------------

    def wait(self, index: int) -> None:
        """Wait until the gradient of a parameter is there, if one was sent, and what was to be done then has been.

        Raises:
            Exception: what came in its way.
            StallError: it does not come.
        """
        arrival = self._latest.get(index)
        if arrival is None:
            self._raise_error()  # it may have been one of those that are given up
            return
        if not arrival.done():
            self._watch.wait(
                lambda seconds: bool(wait_for([arrival], timeout=seconds).done),
                lambda: f"{self._label(index)} is waited for on its way from the device; {self._report()}",
            )
        arrival.result()

    def settle(self) -> None:
        """Wait until all of them are there.

        Raises:
            Exception: what the first one met. All are worth nothing.
        """
        with self._waiting():
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
        """Nothing of them is wanted any more, what failed included.

        Raises:
            StallError: one does not come.
        """
        with self._waiting():
            self._settle()
        self._error = None

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - began

    def _label(self, index: int) -> str:
        return f"the gradient of {self._names[index] if self._names else index}"

    def _report(self) -> str:
        return f"{self._sent - self._gone} gradients are on their way from {self._device.name}"

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (leaving := self._queue.get()) is not None:
            try:
                self._take_in(leaving)
            except Exception as error:  # it must surface where gradients are wanted, and free whoever waits
                self._error = self._error or error
                leaving.arrival.set_exception(error)
            else:
                leaving.arrival.set_result(None)
            finally:
                self._gone += 1

    def _take_in(self, leaving: _Leaving) -> None:
        try:
            self._device.wait(leaving.event)
            if leaving.work is not None and self._error is None:  # what it adds to is lost otherwise
                leaving.work()
        finally:
            if leaving.ringed:
                self._ring.give_back()
        self._raise_error()

    def close(self) -> None:
        """End the thread and give the memory back. What was enqueued to the device has been carried out."""
        self._error = self._error or ClosedError("the model was closed while gradients were on their way")
        self._queue.put(None)
        self._thread.join()
        self._held.clear()
        if self.arena is not None:
            self.arena.close()
