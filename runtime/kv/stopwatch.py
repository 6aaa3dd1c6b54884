"""How long calls of a model take, seen by its cache: from one layer's keys and values to the next one's."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ...scheduler.kv.prefilltime import MeasuredPrefill


class CallStopwatch:
    """Times calls from the first layer to the last one, and takes each of the layers between to be like all.

    Calls of one sequence whose keys are made on the CPU are timed: a GPU has not computed what it was told to when the
    host goes on.

    Args:
        layers: How many there are; one alone has nothing to be timed by.
        measured: Hears of calls.
        clock: Seconds.
    """

    def __init__(
        self, layers: int, measured: MeasuredPrefill, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._layers = layers
        self._measured = measured
        self._clock = clock
        self._began: tuple[int, int, float] | None = None
        """Tokens before, tokens of the call, and when its first layer had made keys."""

    def passes(self, number: int, before: int, keys: torch.Tensor) -> None:
        """A layer has made keys [rows, heads, tokens, dim] in a call, after so many that it has."""
        if self._layers == 1 or keys.shape[0] != 1 or keys.device.type != "cpu":
            return
        if number == 0:
            self._began = before, keys.shape[2], self._clock()
        elif number == self._layers - 1 and self._began is not None:
            (was_before, tokens, began_s), self._began = self._began, None
            if (was_before, tokens) == (before, keys.shape[2]):
                seconds = (self._clock() - began_s) * self._layers / (self._layers - 1)
                self._measured.hear(before, tokens, seconds)
