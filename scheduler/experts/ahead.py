"""Experts of the next layer, brought while this one computes, where a simulation says that it gains time.

Behind all that the layer moves itself: on one tier from disk, beside a device apart from host memory, over the link.
What the next layer's router says of this layer's tokens is known before the layer computes, so the drive, or the link,
can go on from one to the other. `Prefetcher` decides, and learns what that was worth.

Beside a device, what the CPU computes comes first: it is copied to the device, where the cache would have it, while the
link has nothing else to do (*filled*). What would have to be read from disk for that is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Final

from .events import Event
from .idle import IdleTime
from .layerpass import LayerPass
from .layerscheduler import LayerScheduler
from .pool import ExpertPool
from .prefetch import Prefetched, Prefetcher, PrefetchStatistics
from .timelines import ExpertTask
from .trace import Ids, IntArray

_WEIGHT: Final = 0.1
"""Of the last time between two layers, in the mean of those so far."""


class LookAhead:
    """Prefetches for a pool.

    Args:
        pool: Whose layers run. It has room for one expert more than is brought ahead.
        scheduler: Plans layers, with what moving and computing an expert takes on this machine.
        clock: Seconds, monotonic.
    """

    def __init__(self, pool: ExpertPool, scheduler: LayerScheduler, *, clock: Callable[[], float]) -> None:
        self._pool = pool
        self._separate = scheduler.costs.separate
        self._scheduler = scheduler
        self._clock = clock
        self._ways = {together: _Way(Prefetcher(scheduler, most=pool.spare)) for together in (False, True)}
        """Whether micro-batches pass layers together, which takes other times and is right in other cases."""
        self._way = self._ways[False]
        """Of the layer that runs, or ran last."""
        self._ended: tuple[int, float] | None = None
        """The layer that ended last, and when."""
        self._ahead: tuple[int, tuple[Prefetched, ...]] = (-1, ())
        """What was to be brought ahead, for which layer."""

    def statistics(self) -> PrefetchStatistics:
        """What came of it so far."""
        one, many = (way.prefetcher.statistics() for way in self._ways.values())
        return one.plus(many)

    def wants_guesses(self, layer: int, *, together: bool = False) -> bool:
        """Whether it is worth asking what the layer behind this one will need: not where that has everything, nor while
        prefetching pauses."""
        return not self._pool.cache.held[layer + 1].all() and not self._ways[together].prefetcher.pauses()

    def guesses(self, layer: int, ask: Callable[[], Ids | None], *, together: bool) -> Ids | None:
        """What the layer behind this one will need, if that is worth asking; what the answer takes is held against what
        it gains.

        Args:
            layer: That is about to run.
            ask: Gives [T, K] experts of the next one; None where nobody knows.
            together: Whether tokens of several micro-batches pass it.
        """
        if not self.wants_guesses(layer, together=together):
            return None
        began = self._clock()
        found = ask()
        self._ways[together].prefetcher.spent(self._clock() - began)
        return found

    def begun(self, event: Event, run: LayerPass, *, together: bool = False) -> None:
        """A layer runs. Called while the pool runs it, before anything is computed.

        Args:
            event: The layer.
            run: It.
            together: Whether tokens of several micro-batches pass it.
        """
        now = self._clock()
        before, way = self._way, self._ways[together]
        self._way = way
        if before is way and self._ended is not None and self._ended[0] + 1 == event.layer:
            way.passed(now - self._ended[1])
        layer, ahead = self._ahead
        self._ahead = (-1, ())
        if before is way and layer == event.layer and event.phase == "decode":
            way.prefetcher.settle(_without(run.tasks, run.ahead, separate=self._separate), ahead)
        if event.phase == "prefill" or way.between_s is None or (event.guesses is None and not run.by_cpu):
            return
        idle = IdleTime.behind(self._scheduler.plan(run.tasks), self._scheduler.costs, way.between_s)
        if self._separate:
            idle.free_s["disk"] = inf
            self._fill(event, run, idle)
        if event.guesses is not None and event.guessed_rows is not None:
            self._bring(event, event.guesses, event.guessed_rows, idle, together=together)
            way.prefetcher.spent(self._clock() - now)

    def _fill(self, event: Event, run: LayerPass, idle: IdleTime) -> None:
        """Bring what the CPU computes, as far as the link has time for it."""
        for expert in run.by_cpu:
            if not idle.has_room("link"):
                return
            if self._pool.fill(event, expert):
                idle.take("link")

    def _bring(self, event: Event, guesses: IntArray, rows: IntArray, idle: IdleTime, *, together: bool) -> None:
        """Bring what the next layer is expected to need. What passes through for many tokens takes all the room there
        is: then it comes when the last of that has been used."""
        following = event.layer + 1
        held = self._pool.cache.held[following].nonzero()[0].tolist()
        expected = self._pool.tasks(following, guesses.tolist(), rows.tolist(), held)
        ranks = None if event.guess_ranks is None else dict(_pairs(guesses, event.guess_ranks))
        chosen = self._ways[together].prefetcher.choose(expected, idle, ranks=ranks)
        self._pool.prefetch(following, [each.expert for each in chosen], later=together)
        self._ahead = following, chosen

    def ended(self, event: Event) -> None:
        """The layer has been computed, and what was to be brought meanwhile is on its way, or will not be."""
        layer, chosen = self._ahead
        brought = set(self._pool.brought_ahead)
        self._ahead = layer, tuple(each for each in chosen if each.expert in brought)
        self._ended = event.layer, self._clock()


@dataclass(slots=True, eq=False)
class _Way:
    """How layers are passed, and what is known of that."""

    prefetcher: Prefetcher
    between_s: float | None = None
    """Mean time from the end of a layer to the beginning of the next one."""

    def passed(self, seconds: float) -> None:
        """One more such time."""
        before = seconds if self.between_s is None else self.between_s
        self.between_s = before + _WEIGHT * (seconds - before)


def _pairs(keys: IntArray, values: IntArray) -> Iterator[tuple[int, int]]:
    return zip(keys.tolist(), values.tolist(), strict=True)


def _without(tasks: Iterable[ExpertTask], ahead: Collection[int], *, separate: bool) -> list[ExpertTask]:
    """Tasks where they would be if nothing had been brought ahead."""
    there = {"on_device": False} if separate else {"on_host": False}
    return [replace(task, **there) if task.expert in ahead else task for task in tasks]
