"""What was learned of models, by their config: which layers attend to just what a cache gives, how long prompts take.

It belongs to a config object, since it depends on the model's code and on how it was loaded, and a cache that is filled
before the model's first call cannot find it out by itself.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ...scheduler.kv.prefilltime import MeasuredPrefill

Learned = TypeVar("Learned")


class ByConfig(Generic[Learned]):
    """One record for each config that is alive.

    Args:
        make: A record of which nothing is known yet.
    """

    def __init__(self, make: Callable[[], Learned]) -> None:
        self._make = make
        self._records: dict[int, Learned] = {}

    def of(self, config: Any) -> Learned:
        """The record of a config; to be written to."""
        key = id(config)
        if key not in self._records:
            self._records[key] = self._make()
            weakref.finalize(config, self._records.pop, key, None)
        return self._records[key]


@functools.cache
def known_configs() -> ByConfig[dict[int, bool]]:
    """By number of the layer, whether it attends to just what it is given: of this process."""
    return ByConfig(dict[int, bool])


@functools.cache
def measured_prefills() -> ByConfig[MeasuredPrefill]:
    """What calls of models took: of this process."""
    return ByConfig(MeasuredPrefill)
