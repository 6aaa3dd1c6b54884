"""What a replay or a run counts: hits and misses by cause, bytes, and seconds, of prompts and of decoding apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from .cache import CacheStatistics, ExpertCache, Origin
from .events import Event
from .prefetch import PrefetchStatistics
from .shape import Routing
from .trace import Phase

HitCause = Literal["kept", "filled", "prefetched", "warmed"]
MissCause = Literal["first", "evicted", "passed by"]
HIT_CAUSES: Final[tuple[HitCause, ...]] = ("kept", "filled", "prefetched", "warmed")
"""kept: since a layer missed it. filled: since another processor computed it. prefetched: for this very use. warmed:
since a prompt used it."""
MISS_CAUSES: Final[tuple[MissCause, ...]] = ("first", "evicted", "passed by")
"""first: it was never used before. evicted: it has been in the cache. passed by: it was used, and never admitted
since."""
_CAUSES: Final[dict[int, HitCause]] = {
    Origin.MISSED: "kept",
    Origin.FILLED: "filled",
    Origin.WARMED: "warmed",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseResult:
    """Of all steps of one phase. A use is one expert in one layer of one step, for however many tokens."""

    tokens: int
    uses: int
    hits: Mapping[HitCause, int]
    misses: Mapping[MissCause, int]
    seconds: float
    """Simulated, of the expert layers alone; 0 where there are no costs."""
    read_nbytes: int
    copied_nbytes: int
    computed_by_cpu: int
    """Uses."""

    @property
    def hit_rate(self) -> float:
        """Share of uses; 0 where there are none."""
        return sum(self.hits.values()) / self.uses if self.uses else 0.0

    @property
    def kept_rate(self) -> float:
        """The same without what was prefetched for the use, which no cache of that size has to hold."""
        return (sum(self.hits.values()) - self.hits.get("prefetched", 0)) / self.uses if self.uses else 0.0

    @property
    def seconds_per_token(self) -> float:
        """0 where there are no tokens."""
        return self.seconds / self.tokens if self.tokens else 0.0


@dataclass(kw_only=True, slots=True)
class Account:
    """The same while it is being counted."""

    tokens: int = 0
    uses: int = 0
    hits: Counter[HitCause] = field(default_factory=Counter)
    misses: Counter[MissCause] = field(default_factory=Counter)
    seconds: float = 0.0
    reads: int = 0
    copies: int = 0
    computed_by_cpu: int = 0

    def result(self, expert_nbytes: int) -> PhaseResult:
        """What it came to."""
        return PhaseResult(
            tokens=self.tokens,
            uses=self.uses,
            hits={cause: self.hits[cause] for cause in HIT_CAUSES},
            misses={cause: self.misses[cause] for cause in MISS_CAUSES},
            seconds=self.seconds,
            read_nbytes=self.reads * expert_nbytes,
            copied_nbytes=self.copies * expert_nbytes,
            computed_by_cpu=self.computed_by_cpu,
        )


class Causes:
    """Counts uses by why their expert is there, or is not."""

    def __init__(self, routing: Routing) -> None:
        self._used = np.zeros((routing.layers, routing.experts), np.bool_)
        self._was_held = np.zeros_like(self._used)

    def count(self, account: Account, event: Event, cache: ExpertCache, near: Iterable[bool]) -> None:
        """Count an event, before anything is admitted for it.

        Args:
            account: Of the event's phase.
            event: One layer in one step.
            cache: Of the tier that computes.
            near: By expert of the event, whether it is in that tier: in the cache, or apart from it.
        """
        layer = event.layer
        account.tokens += event.tokens if layer == 0 else 0
        account.uses += len(event.experts)
        for expert, there in zip(event.experts.tolist(), near, strict=True):
            origin = int(cache.origins[layer, expert])
            if origin:
                account.hits[_CAUSES[origin]] += 1
            elif there:
                account.hits["prefetched"] += 1
            elif not self._used[layer, expert]:
                account.misses["first"] += 1
            elif self._was_held[layer, expert]:
                account.misses["evicted"] += 1
            else:
                account.misses["passed by"] += 1

    def passed(self, event: Event, cache: ExpertCache) -> None:
        """The same event is over."""
        self._used[event.layer, event.experts] = True
        self._was_held[event.layer] |= cache.held[event.layer]


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStatistics:
    """What a pool did so far."""

    prefill: PhaseResult
    decode: PhaseResult
    cache: CacheStatistics
    capacity: int
    """Experts that the cache can hold."""
    passing: int
    """Experts that can be on their way through at a time, besides."""
    prefetching: PrefetchStatistics | None = None
    """None where nothing is brought ahead."""

    def of(self, phase: Phase) -> PhaseResult:
        """The figures of one phase."""
        return self.prefill if phase == "prefill" else self.decode
