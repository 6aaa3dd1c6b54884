"""Several threads that run one model together, and each streamed block is brought once for all of them.

Each member runs the model's own code in a thread of its own. One has the device. It hands that on where it needs a
block that is not shared now (`scheduler/turnstile.py` says to whom), so the model's code need not know of it. One more
has the CPU, where parts of the model are computed from host memory. To the executor a sweep is one root call, and a
shared block one lease.

Where members would each bring what depends on what they compute, as experts do, they meet: once nobody else comes, one
of them has it done for all.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from ..scheduler.executor import WATCH_S, Executor
from ..scheduler.lease import Lease
from ..scheduler.mover import Event
from ..scheduler.turnstile import Turnstile
from .guess import breadth_of, module_of

logger = logging.getLogger(__name__)

Given = TypeVar("Given")
Result = TypeVar("Result")

_QUIET_WATCHES: Final = 6
"""Times that a wait for a turn is looked at before it is told of: a prefill may take long."""


class StoppedError(Exception):
    """Raised in the threads of the members, to end them, once the sweep is stopped. Never leaves the runtime."""


class Sweep:
    """The members' side of an executor.

    Only the member that has the device changes what has no lock here.

    Args:
        members: Their numbers.
        resident: Whether a block stays in memory; such a block is leased by each member without a turn.
        computed: An event after all that has been enqueued for computing.
        on_cpu: Blocks that the CPU computes for calls of few rows, while others go on on the device. Without, one
            processor computes.
        ahead: Blocks that may stay leased for members that are on the CPU, besides what one member needs.
        nbytes: Of each block, for what the processors' shares are counted in.
        places: Where members meet: by number of the place, counted from 0, the last block that comes before it.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        members: Iterable[int],
        resident: Callable[[int], bool],
        computed: Callable[[], Event],
        on_cpu: frozenset[int] = frozenset(),
        ahead: int = 0,
        nbytes: Mapping[int, int] | None = None,
        places: Sequence[int] = (),
    ) -> None:
        self.on_cpu = on_cpu
        self._places = places
        self._stretch = len(places) + 1
        """The turnstile knows blocks and places by one row of numbers: between those of two blocks, all places fit."""
        self._given: dict[int, dict[int, Any]] = {}
        """By place: what each member who waits there has brought."""
        self._results: dict[int, Any] = {}
        """By member: what was made of that."""
        self._nbytes = nbytes or {}
        self._device_nbytes = self._cpu_nbytes = 0
        """Bytes of weights that either processor has used, as often as it did."""
        self._executor = executor
        self._resident = resident
        self._computed = computed
        self._turnstile = Turnstile(ahead=ahead)
        self._lock = threading.RLock()
        """Held while anything of the turnstile's is looked at or changed, and never while anybody is waited for. Who
        gives a processor back says so and hands it on at once: others would take it for one that waits already."""
        self._roots: dict[int, Hashable] = {}
        """The root call that each member wants to begin, or is in."""
        self._batons = {member: threading.Semaphore(0) for member in members}
        self._threads: dict[int, int] = {}
        """Members by thread."""
        self._shared: dict[int, Lease] = {}
        self._accesses: dict[int, Counter[int]] = {member: Counter() for member in self._batons}
        """By member: how often it used each block in this sweep."""
        self._told = Counter[int]()
        """How often the executor was told so: as often as the member that used it most."""
        self._failed = False
        for member in self._batons:
            self._turnstile.join(member)

    @property
    def coming(self) -> int:
        """The number of the next sweep to begin, counted from 1."""
        return self._turnstile.begun + 1

    @property
    def ended(self) -> int:
        """Sweeps that have ended."""
        return self._turnstile.ended

    @property
    def cpu_share(self) -> float:
        """The part of the weights used so far, by bytes and as often as they were, that the CPU computed with."""
        return self._cpu_nbytes / max(self._cpu_nbytes + self._device_nbytes, 1)

    def withdraw(self, member: int) -> None:
        """A member will not take part after all. Before `start`."""
        self._turnstile.leave(member)
        del self._batons[member], self._accesses[member]

    def start(self) -> None:
        """Give the device to the first member, once the threads of all are there."""
        first = self._turnstile.start()
        if first is not None:
            self._batons[first].release()

    def stop(self) -> None:
        """Have every member end, each in its turn, with `StoppedError`. From any thread."""
        self._turnstile.stopping = True

    def check(self) -> None:
        """Raise where the sweep is stopped.

        Raises:
            StoppedError: it is.
        """
        if self._turnstile.stopping:
            raise StoppedError

    # --- called by members ------------------------------------------------------------------------------------------

    @contextmanager
    def taking_part(self, member: int) -> Iterator[None]:
        """The calling thread is this member; the context is entered with the device and hands it on at its end."""
        self._threads[threading.get_ident()] = member
        try:
            self._wait(member)
            self.check()
            yield
        except BaseException:
            self.stop()
            raise
        finally:
            del self._threads[threading.get_ident()]
            with self._lock:
                self._turnstile.leave(member)
                self._hand_on(member)

    def takes_part(self) -> bool:
        """Whether the calling thread is a member."""
        return threading.get_ident() in self._threads

    def begin(self, root: Hashable) -> None:
        """A member's root call starts: wait for the sweep to begin, and for the device."""
        member = self._here()
        with self._lock:
            self._roots[member] = root
            self._turnstile.arrive(member, module_of(root), breadth=breadth_of(root))
        self._pass_on(member)

    def end(self, *, failed: bool) -> None:
        """A member's root call ended. It keeps the device."""
        self._failed |= failed
        with self._lock:
            self._turnstile.finish(self._here())

    def rest(self) -> None:
        """Sit out until one more sweep has ended."""
        member = self._here()
        with self._lock:
            self._turnstile.rest(member)
        self._pass_on(member)

    def acquire(self, block: int, *, observed: bool = True) -> Lease:
        """A lease on a block: the shared one where it is streamed. Others may run before it is granted.

        Raises:
            PenstockError: as for the executor.
            StoppedError: the sweep was stopped.
        """
        if not observed or not self.takes_part():
            return self._executor.acquire(block, observed=observed)
        self.check()
        member = self._here()
        self._accesses[member][block] += 1
        self._device_nbytes += self._nbytes.get(block, 0)
        if self._resident(block):
            return self._executor.acquire(block, observed=self._is_new(member, block))
        with self._lock:
            shared = self._turnstile.wants(member, self._number(block))
        if not shared:
            self._pass_on(member)
        new = self._is_new(member, block)
        lease = self._shared.get(block)
        if lease is None:
            lease = self._executor.acquire(block, observed=new)
            with self._lock:
                self._shared[block] = lease
                self._turnstile.shares(self._number(block))
        with self._lock:
            self._turnstile.uses(member, self._number(block))
        return lease

    def meet(self, place: int, given: Given, compute: Callable[[Sequence[Given]], Sequence[Result]]) -> Result:
        """Bring something to a place, and have what comes of it once all who come there in this sweep have come.

        Args:
            place: Its number.
            given: What this member brings.
            compute: Called by one of the members, with what all of them have brought; gives a result for each.

        Raises:
            StoppedError: the sweep was stopped.
        """
        member = self._here()
        self.check()
        waiting = self._given.setdefault(place, {})
        waiting[member] = given
        number = self._number(self._places[place]) + 1 + place
        with self._lock:
            self._turnstile.meets(member, number)
        self._pass_on(member)
        if member not in self._results:
            there = self._given.pop(place)
            self._results.update(zip(there, compute(list(there.values())), strict=True))
            with self._lock:
                self._turnstile.met(number)
        found: Result = self._results.pop(member)
        return found

    def release(self, lease: Lease, event: Event = None) -> None:
        """Give a lease back; a shared one is kept until all have used it."""
        if self._shared.get(lease.block) is lease:
            with self._lock:
                self._turnstile.used(self._here(), self._number(lease.block))
        else:
            self._executor.release(lease, event)

    @contextmanager
    def away(self, part: Hashable, blocks: Sequence[int]) -> Iterator[None]:
        """The member gives the device up, and the context is entered when it has the CPU; at its end, when others have
        gone on there meanwhile, it has the device again.

        Args:
            part: What is computed; nobody is inside of it on the device meanwhile. None where that does not matter.
            blocks: Its weights.

        Raises:
            StoppedError: the sweep was stopped.
        """
        member = self._here()
        self.check()
        with self._lock:
            self._turnstile.crosses(member, part, last_block=self._number(max(blocks)))
            goes_on = self._hand_on(member)
        if not goes_on:
            self._wait(member)
        if not self._turnstile.on_cpu(member):
            self.check()
            raise AssertionError(f"member {member} was given the device, though nothing has stopped")
        try:
            self._cpu_nbytes += sum(self._nbytes.get(block, 0) for block in blocks)
            yield
        finally:
            with self._lock:
                self._turnstile.crossed(member)
                goes_on = self._hand_on(member)
            if not goes_on:
                self._wait(member)
        self.check()

    @contextmanager
    def inside(self, part: Hashable, blocks: Sequence[int]) -> Iterator[None]:
        """The member computes on the device what the CPU computes for others. Entered when the CPU is elsewhere.

        Raises:
            StoppedError: the sweep was stopped.
        """
        member = self._here()
        self.check()
        with self._lock:
            enters = self._turnstile.enters(member, part, first_block=self._number(min(blocks)))
        if not enters:
            self._pass_on(member)
        try:
            yield
        finally:
            with self._lock:
                self._turnstile.left(part)
                self._hand_on(None)  # somebody may wait for this part on the CPU

    # --- who goes on --------------------------------------------------------------------------------------------------

    def _is_new(self, member: int, block: int) -> bool:
        """Whether no other member has used the block so often in this sweep: it belongs to the order, once."""
        if self._accesses[member][block] <= self._told[block]:
            return False
        self._told[block] += 1
        return True

    def _number(self, block: int) -> int:
        """What the turnstile knows a block by."""
        return block * self._stretch

    def _here(self) -> int:
        return self._threads[threading.get_ident()]

    def _pass_on(self, member: int) -> None:
        """Let others run, if it is their turn, and come back with the device.

        Raises:
            StoppedError: the sweep was stopped.
        """
        if not self._hand_on(member):
            self._wait(member)
        self.check()

    def _hand_on(self, member: int | None) -> bool:
        """Do what comes next, and let those go on whose turn it is; returns whether `member` is one of them."""
        with self._lock:
            turn = self._turnstile.turn(member)
            try:
                for number in turn.release:
                    self._executor.release(self._shared.pop(number // self._stretch), self._computed())
                if turn.ends:
                    self._executor.end(failed=self._failed or self._turnstile.stopping)
                if turn.begins:
                    self._told.clear()
                    for accesses in self._accesses.values():
                        accesses.clear()
                    self._executor.begin(max((self._roots[each] for each in turn.admitted), key=breadth_of))
            finally:  # whose turn it is goes on, and meets the failure itself
                for each in (turn.member, turn.cpu):
                    if each is not None and each != member:
                        self._batons[each].release()
            return member is not None and member in (turn.member, turn.cpu)

    def _wait(self, member: int) -> None:
        watches = 0
        while not self._batons[member].acquire(timeout=WATCH_S):
            watches += 1
            if watches % _QUIET_WATCHES == 0:
                logger.info("micro-batch %d has waited %.0f s for its turn", member, watches * WATCH_S)
