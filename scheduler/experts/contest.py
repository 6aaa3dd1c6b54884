"""Several ways to run a cache on the same events, and over recipes: which takes least time where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from .cache import ADMISSION, MINIMUM, Admission, CacheSetting
from .events import Event, events_of
from .generate import generate_trace
from .layerscheduler import LayerScheduler
from .policies import policy
from .recipe import Recipe
from .replay import ReplayResult, ReplaySetting, replay
from .shape import Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One way to run a cache."""

    policy: str
    admission: Admission = ADMISSION
    minimum: float = MINIMUM

    @property
    def name(self) -> str:
        """For people: what differs from the defaults is told."""
        rule = "" if self.admission == ADMISSION else f", admits {self.admission}"
        share = "" if self.minimum == MINIMUM else f", minimum {self.minimum:g}"
        return f"{self.policy}{rule}{share}"


def compete(
    routing: Routing,
    events: Sequence[Event],
    contenders: Iterable[Contender],
    capacity: int,
    *,
    scheduler: LayerScheduler | None,
    expert_nbytes: int = 0,
    host: int | None = None,
    prefetch: int = 0,
    between_s: float = 0.0,
) -> Iterator[tuple[Contender, ReplayResult]]:
    """Replay each contender from a cold start; settings as of `ReplaySetting`."""
    for contender in contenders:
        cache = CacheSetting(capacity=capacity, minimum=contender.minimum, admission=contender.admission)
        setting = ReplaySetting(cache=cache, host=host, prefetch=prefetch, between_s=between_s)
        yield (
            contender,
            replay(
                routing,
                events,
                policy(contender.policy, routing),
                setting,
                scheduler=scheduler,
                expert_nbytes=expert_nbytes,
            ),
        )


ZIPFS: Final = (0.0, 0.6, 1.2)
CONTEXTS: Final = (0.0, 0.7, 2.0)
TOKENS: Final = (0.25, 1.0)
"""Parameters of recipes over which a map is drawn: what skew, drift and words contribute to a gate's logits."""


def recipes_around(recipe: Recipe) -> Iterator[Recipe]:
    """A recipe with each combination of ZIPFS, CONTEXTS and TOKENS in the place of its own."""
    for token in TOKENS:
        for context in CONTEXTS:
            for zipf in ZIPFS:
                yield msgspec.structs.replace(recipe, zipf=zipf, context=context, token=token)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One recipe, and what the contenders make of it."""

    recipe: Recipe
    results: Mapping[Contender, ReplayResult]

    def decode_s(self, contender: Contender) -> float:
        """Seconds per token that is generated."""
        return self.results[contender].decode.seconds_per_token

    @property
    def best(self) -> Contender:
        """The one with the least seconds."""
        return min(self.results, key=self.decode_s)

    def behind(self, contender: Contender) -> float:
        """By how much of the best one's seconds another one takes longer."""
        least = self.decode_s(self.best)
        return self.decode_s(contender) / least - 1 if least else 0.0


def compete_over(
    recipes: Iterable[Recipe],
    contenders: Sequence[Contender],
    share: float,
    scheduler: LayerScheduler,
    *,
    host: float = 1.0,
) -> Iterator[Cell]:
    """Run all contenders on all recipes.

    Args:
        recipes: With sizes of experts.
        contenders: All of them.
        share: Of all experts, what the cache holds.
        scheduler: For seconds.
        host: Of all experts, what the host holds where there is a device.
    """
    for recipe in recipes:
        routing = recipe.routing
        events = events_of(generate_trace(recipe))
        results = compete(
            routing,
            events,
            contenders,
            round(share * routing.total),
            scheduler=scheduler,
            host=round(host * routing.total),
        )
        yield Cell(recipe=recipe, results=dict(results))
