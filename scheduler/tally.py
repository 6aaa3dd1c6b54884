"""What the executor tells about itself: records on the timeline, and totals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from .lease import Wish
from .order import OrderStatistics
from .residence import Residence, Tier
from .timeline import Kind, Record, Timeline


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorStatistics:
    """Totals since the executor was made."""

    acquires: int
    on_time: int
    """Acquires that found their block ready."""
    late: int
    """Acquires whose block was on its way."""
    demanded: int
    """Acquires whose block had not been asked for."""
    waited_ns: int
    wasted: int
    """Blocks brought and dropped without having been used."""
    exchanged: int
    """Blocks that took the place of another one that stayed, because the order that repeats does not use it."""
    on_cpu: int
    """Leases of host copies, for computing on the CPU. Not among the acquires, which are the device's."""
    orders: OrderStatistics


@dataclass(kw_only=True, slots=True, eq=False)
class Tally:
    """Counts and records. Changed only under the executor's lock."""

    timeline: Timeline
    clock: Callable[[], int]
    nbytes: Mapping[int, int]
    on_time: int = 0
    late: int = 0
    demanded: int = 0
    waited_ns: int = 0
    exchanged: int = 0
    on_cpu: int = 0

    def span(self, kind: Kind, block: int, start_ns: int, *, issued_ns: int = -1, urgent: bool = False) -> None:
        """Record what began at `start_ns` and ends now."""
        self.timeline.add(
            Record(
                kind=kind,
                block=block,
                start_ns=start_ns,
                end_ns=self.clock(),
                nbytes=self.nbytes.get(block, 0),
                issued_ns=issued_ns,
                urgent=urgent,
            )
        )

    def used(self, held: Residence, at_ns: int) -> None:
        """Tell a listener, if there is one, that a consumer that asked at `at_ns` has the block now."""
        listener = self.timeline.listener
        if listener is not None:
            listener(
                Record(kind="use", block=held.block, start_ns=at_ns, end_ns=held.ready_ns, issued_ns=held.issued_ns)
            )

    def instant(self, kind: Kind, block: int) -> None:
        """Record what happens now."""
        self.span(kind, block, self.clock())

    def statistics(self, *, wasted: int, orders: OrderStatistics) -> ExecutorStatistics:
        """A frozen record of the totals."""
        return ExecutorStatistics(
            acquires=self.on_time + self.late + self.demanded,
            on_time=self.on_time,
            late=self.late,
            demanded=self.demanded,
            waited_ns=self.waited_ns,
            wasted=wasted,
            exchanged=self.exchanged,
            on_cpu=self.on_cpu,
            orders=orders,
        )


def who_waits(wishes: Iterable[Wish], front: Tier, back: Tier | None) -> str:
    """Who waits for what, on one line: the watchdog's text."""
    waits = ", ".join(f"block {wish.block}{' in the host' if wish.host else ''}" for wish in wishes) or "nothing"
    flying = ", ".join(
        f"{tier.name}:{block}"
        for tier in (front, back)
        if tier is not None
        for block, held in tier.holding.items()
        if not held.ready
    )
    leased = ", ".join(str(block) for block, held in front.holding.items() if held.leases)
    return f"waiting for {waits}; on the way: {flying or 'nothing'}; leased: {leased or 'nothing'}"
