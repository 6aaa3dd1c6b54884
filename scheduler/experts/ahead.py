"""Experts of the next layer, brought while this one computes, where a simulation says that it gains time.

On one tier: from disk, behind all that the layer reads itself. What the next layer's router says of this layer's tokens
is known before the layer computes, so the drive can go on from one to the other. `Prefetcher` decides, and learns what
that was worth.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Final

from .events import Event
from .idle import IdleTime
from .layerscheduler import LayerScheduler
from .pool import ExpertPool
from .prefetch import Prefetched, Prefetcher, PrefetchStatistics
from .timelines import ExpertTask
from .trace import IntArray

_WEIGHT: Final = 0.1
"""Of the last time between two layers, in the mean of those so far."""


class LookAhead:
    """Prefetches for a pool.

    Args:
        pool: Whose layers run. It has room for one expert more than is brought ahead.
        scheduler: Plans layers, with what reading and computing an expert takes on this machine.
        clock: Seconds, monotonic.
    """

    def __init__(self, pool: ExpertPool, scheduler: LayerScheduler, *, clock: Callable[[], float]) -> None:
        assert not scheduler.costs.separate, "experts are brought ahead from disk only"
        self._pool = pool
        self._scheduler = scheduler
        self._clock = clock
        self._prefetcher = Prefetcher(scheduler, most=pool.spare)
        self._between_s: float | None = None
        """Mean time from the end of a layer to the beginning of the next one."""
        self._ended: tuple[int, float] | None = None
        """The layer that ended last, and when."""
        self._ahead: tuple[int, tuple[Prefetched, ...]] = (-1, ())
        """What was brought ahead, for which layer."""

    def statistics(self) -> PrefetchStatistics:
        """What came of it so far."""
        return self._prefetcher.statistics()

    def wants_guesses(self, layer: int) -> bool:
        """Whether it is worth asking what the layer behind this one will need: not where that has everything, nor while
        prefetching pauses."""
        return not self._pool.cache.held[layer + 1].all() and not self._prefetcher.pauses()

    def begun(self, event: Event, held: Collection[int]) -> None:
        """A layer runs: `held` are the experts that its cache had when it began. Called while the pool runs it."""
        now = self._clock()
        if self._ended is not None and self._ended[0] + 1 == event.layer:
            passed = now - self._ended[1]
            before = passed if self._between_s is None else self._between_s
            self._between_s = before + _WEIGHT * (passed - before)
        here = _tasks(event.experts, event.rows, held)
        layer, ahead = self._ahead
        self._ahead = (-1, ())
        if layer == event.layer and event.phase == "decode":
            self._prefetcher.settle(here, ahead)
        if event.phase == "prefill" or event.guesses is None or event.guessed_rows is None or self._between_s is None:
            return
        brought = {each.expert for each in ahead} if layer == event.layer else set()
        plan = self._scheduler.plan(_tasks(event.experts, event.rows, {*held, *brought}))
        idle = IdleTime.behind(plan, self._scheduler.costs, self._between_s)
        following = event.layer + 1
        expected = _tasks(event.guesses, event.guessed_rows, self._pool.cache.held[following].nonzero()[0].tolist())
        ranks = None if event.guess_ranks is None else dict(_pairs(event.guesses, event.guess_ranks))
        chosen = self._prefetcher.choose(expected, idle, ranks=ranks)
        placed = set(self._pool.prefetch(following, [each.expert for each in chosen]))
        self._ahead = following, tuple(each for each in chosen if each.expert in placed)

    def ended(self, event: Event) -> None:
        """The layer has been computed."""
        self._ended = event.layer, self._clock()


def _pairs(keys: IntArray, values: IntArray) -> Iterator[tuple[int, int]]:
    return zip(keys.tolist(), values.tolist(), strict=True)


def _tasks(experts: IntArray, rows: IntArray, held: Collection[int]) -> list[ExpertTask]:
    """Experts, where they would be without being brought ahead."""
    there = frozenset(held)
    return [
        ExpertTask(expert=expert, rows=count, on_device=False, on_host=expert in there)
        for expert, count in zip(experts.tolist(), rows.tolist(), strict=True)
    ]
