"""One layer of experts while it runs: what is brought when, and in which order it is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..lease import Lease
from ..mover import Event as DeviceEvent
from .timelines import ExpertTask

if TYPE_CHECKING:
    from .pool import ExpertPool


class LayerPass:
    """One layer while it runs: part by part, all its experts in `order`.

    Args:
        pool: Whose it is.
        layer: Its number.
        there: Experts that the cache has and the CPU does not compute, without `ahead`.
        ahead: Those that were brought before the layer asked.
        missed: Those that must be brought, in the order in which they are.
        admitted: Those of them that stay.
        by_cpu: Those that the CPU computes from host memory, beside a device apart.
        kept: Those that host memory has made room for, and that are being read there.
        tasks: All that the layer needs, each where it is when the layer begins: what was brought ahead is where
            it was brought to, though it may still be on its way.
    """

    def __init__(
        self,
        pool: ExpertPool,
        layer: int,
        there: Sequence[int],
        ahead: Sequence[int],
        missed: Sequence[int],
        admitted: set[int],
        by_cpu: Sequence[int] = (),
        kept: Sequence[int] = (),
        tasks: Sequence[ExpertTask] = (),
    ) -> None:
        self._pool = pool
        self.tasks = tuple(tasks)
        """What the layer needs, each where it was, or was on its way to, when the layer began."""
        self.ahead = tuple(ahead)
        """Experts that were brought before the layer asked."""
        self.by_cpu = tuple(by_cpu)
        """Experts that the CPU computes; `order` is without them."""
        self.kept = tuple(kept)
        """Experts that host memory keeps from now on."""
        self.layer = layer
        # Those that stay have slots at once, so that many reads are under way; the others wait for each other.
        read = sorted(missed, key=lambda expert: expert not in admitted)
        brought = (*ahead, *read)
        self.order = (*there, *brought)
        """Experts in the order in which they are to be computed, the same in every part."""
        self._passing = set(brought) - admitted
        self._to_read = [deque(read) for _ in range(pool.parts)]

    @property
    def all_asked_for(self) -> bool:
        """Whether everything that the layer needs is there or on its way."""
        return not any(self._to_read)

    def advance(self) -> None:
        """Have as much brought as there are slots for."""
        places = []
        for part, waiting in enumerate(self._to_read):
            while waiting:
                placed = self._pool.place(part, self.layer, waiting[0])
                if placed is None:
                    break
                places.append(placed)
                waiting.popleft()
        self._pool.bring(places)

    @contextmanager
    def lent_by_host(self, part: int, expert: int) -> Iterator[Lease]:
        """Lease what lies in host memory of a part of one of `by_cpu`, for as long as the context lasts."""
        lease = self._pool.lend_host(part, self.layer, expert)
        try:
            yield lease
        finally:
            self._pool.give_back(lease, None)

    @contextmanager
    def lent(self, part: int, expert: int, computed: Callable[[], DeviceEvent]) -> Iterator[Lease]:
        """Lease a part for as long as the context lasts, which it does not read again if it only passes through.

        Args:
            part: Of the expert.
            expert: The next of `order` in this part.
            computed: Gives the event after which its bytes may go.
        """
        lease = self._pool.lend(part, self.layer, expert)
        try:
            yield lease
        finally:
            self._pool.give_back(lease, computed())
        if expert in self._passing:
            self._pool.vacate(part, self.layer, expert)
            self.advance()
            self._pool.go_on_ahead()
