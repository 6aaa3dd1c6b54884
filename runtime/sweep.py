"""Several threads that run one model together: one computes at a time, and each streamed block is brought once for all.

Each member runs the model's own code in a thread of its own. The baton is handed over where a member needs a block that
is not shared now (`scheduler/turnstile.py` says to whom), so the model's code need not know of it. To the executor a
sweep is one root call, and a shared block one lease.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from ..scheduler.executor import WATCH_S, Executor
from ..scheduler.lease import Lease
from ..scheduler.mover import Event
from ..scheduler.turnstile import Turnstile

logger = logging.getLogger(__name__)

_QUIET_WATCHES: Final = 6
"""Times that a wait for the baton is looked at before it is told of: a prefill may take long."""


class StoppedError(Exception):
    """Raised in the threads of the members, to end them, once the sweep is stopped. Never leaves the runtime."""


class Sweep:
    """The members' side of an executor.

    Only the member that has the baton changes anything here, so there is no lock. The rest calls `stop` at most.

    Args:
        members: Their numbers.
        resident: Whether a block stays in memory; such a block is leased by each member without a turn.
        computed: An event after all that has been enqueued for computing.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        members: Iterable[int],
        resident: Callable[[int], bool],
        computed: Callable[[], Event],
    ) -> None:
        self._executor = executor
        self._resident = resident
        self._computed = computed
        self._turnstile = Turnstile()
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

    def withdraw(self, member: int) -> None:
        """A member will not take part after all. Before `start`."""
        self._turnstile.leave(member)
        del self._batons[member], self._accesses[member]

    def start(self) -> None:
        """Give the baton to the first member, once the threads of all are there."""
        if self._batons:
            self._batons[min(self._batons)].release()

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
        """The calling thread is this member; the context is entered with the baton and hands it on at its end."""
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
            self._turnstile.leave(member)
            self._hand_on(member)

    def takes_part(self) -> bool:
        """Whether the calling thread is a member."""
        return threading.get_ident() in self._threads

    def begin(self, root: Hashable) -> None:
        """A member's root call starts: wait for the sweep to begin, and for the baton."""
        member = self._here()
        self._turnstile.arrive(member, root)
        self._pass_on(member)

    def end(self, *, failed: bool) -> None:
        """A member's root call ended. It keeps the baton."""
        self._failed |= failed
        self._turnstile.finish(self._here())

    def rest(self) -> None:
        """Sit out until one more sweep has ended."""
        member = self._here()
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
        if self._resident(block):
            return self._executor.acquire(block, observed=self._is_new(member, block))
        if not self._turnstile.wants(member, block):
            self._pass_on(member)
        new = self._is_new(member, block)
        lease = self._shared.get(block)
        if lease is None:
            lease = self._executor.acquire(block, observed=new)
            self._shared[block] = lease
            self._turnstile.shares(block)
        self._turnstile.uses(block)
        return lease

    def release(self, lease: Lease, event: Event = None) -> None:
        """Give a lease back; a shared one is kept until all have used it."""
        if self._shared.get(lease.block) is lease:
            self._turnstile.used(lease.block)
        else:
            self._executor.release(lease, event)

    # --- the baton --------------------------------------------------------------------------------------------------

    def _is_new(self, member: int, block: int) -> bool:
        """Whether no other member has used the block so often in this sweep: it belongs to the order, once."""
        if self._accesses[member][block] <= self._told[block]:
            return False
        self._told[block] += 1
        return True

    def _here(self) -> int:
        return self._threads[threading.get_ident()]

    def _pass_on(self, member: int) -> None:
        """Let others run, if it is their turn, and come back with the baton."""
        if not self._hand_on(member):
            self._wait(member)
        self.check()

    def _hand_on(self, member: int) -> bool:
        """Do what comes next, and hand the baton over; returns whether `member` keeps it."""
        turn = self._turnstile.turn(member)
        for block in turn.release:
            self._executor.release(self._shared.pop(block), self._computed())
        if turn.ends:
            self._executor.end(failed=self._failed or self._turnstile.stopping)
        if turn.begins:
            self._told.clear()
            for accesses in self._accesses.values():
                accesses.clear()
            self._executor.begin(turn.root)
        if turn.member == member:
            return True
        if turn.member is not None:
            self._batons[turn.member].release()
        return False

    def _wait(self, member: int) -> None:
        watches = 0
        while not self._batons[member].acquire(timeout=WATCH_S):
            watches += 1
            if watches % _QUIET_WATCHES == 0:
                logger.info("micro-batch %d has waited %.0f s for its turn", member, watches * WATCH_S)
