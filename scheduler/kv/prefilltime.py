"""What computing a part of a prompt takes: by a calibration, or by what was measured of the calls that there were."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Final, Protocol

import msgspec
import numpy as np

from ..cost import CostModel
from ..operations import Operation

LEAST_TOKENS: Final = 16
"""Of a call that tells how long a prompt takes: those of decoding are bound by something else."""
REACH: Final = 4
"""How many times as long as the longest measured context one may be, and still be foretold by it."""
KEPT: Final = 4
"""Calls that are remembered of each power of two of tokens."""


class PrefillTime(Protocol):
    """What knows how long calls take."""

    def call_s(self, before: int, tokens: int) -> float | None:
        """Seconds of a call with so many tokens, after so many that are there; None where that is not known."""


def prefill_s(times: PrefillTime, before: int, stop: int, *, chunk: int | None = None) -> float | None:
    """Seconds of computing the tokens of a prompt from `before` to `stop`, at most `chunk` in each call."""
    total = 0.0
    while before < stop:
        tokens = min(stop - before, chunk or stop)
        call_s = times.call_s(before, tokens)
        if call_s is None:
            return None
        total += call_s
        before += tokens
    return total


@dataclass(frozen=True, kw_only=True)
class CalibratedPrefill:
    """By a machine's calibration, and the operations of one call of the model. On a machine with a GPU that computes.

    Args:
        costs: Of the machine.
        operations: Of a call with `tokens` tokens, and none before.
        tokens: See there.
        sweep_s: What moving weights takes in each call, beside computing.
    """

    costs: CostModel
    operations: Sequence[Operation]
    tokens: int
    sweep_s: float = 0.0

    def call_s(self, before: int, tokens: int) -> float:
        """See `PrefillTime`. Products have other numbers of rows, attention of keys and queries, all else of bytes."""
        if tokens not in self._parts:
            self._parts[tokens] = self._of(tokens)
        nothing_before_s, each_before_s = self._parts[tokens]
        return max(self.sweep_s, nothing_before_s + each_before_s * before)

    @cached_property
    def _parts(self) -> dict[int, tuple[float, float]]:
        """By tokens of a call: seconds where none are before, and for each that is."""
        return {}

    @cached_property
    def _kinds(self) -> list[Operation]:
        """Operations that are alike, together: layers repeat."""
        counts: dict[Operation, int] = {}
        for one in self.operations:
            counts[one] = counts.get(one, 0) + 1
        return [
            msgspec.structs.replace(one, nbytes=one.nbytes * count, launches=one.launches * count)
            for one, count in counts.items()
        ]

    def _of(self, tokens: int) -> tuple[float, float]:
        scaled = [_scaled(one, tokens / self.tokens) for one in self._kinds]
        attention = [one for one in scaled if one.kind == "attention"]
        return (
            self.costs.compute_s(scaled, "gpu"),
            self.costs.parts_s(attention, "gpu")[1] / tokens,
        )


def _scaled(operation: Operation, times: float) -> Operation:
    """The same in a call with so many times the tokens."""
    if operation.kind == "linear":  # a single row is the last token's, whose logits are wanted
        rows = operation.rows * times if operation.rows > 1 else operation.rows
        return msgspec.structs.replace(operation, rows=rows)
    rows = max(operation.rows * times, 1.0)
    return msgspec.structs.replace(operation, nbytes=operation.nbytes * times, rows=rows)


class MeasuredPrefill:
    """By the calls that there were: seconds ≈ c + a · tokens + b · tokens · (context in the middle of the call).

    c is what each call takes, which is mostly moving weights. Few calls are kept, of each power of two of tokens, and
    all powers count alike, so that thousands of decoded tokens do not drown a prompt.
    """

    def __init__(self) -> None:
        self._calls: dict[int, deque[tuple[int, int, float]]] = {}
        """(before, tokens, seconds), by bits of tokens."""
        self._fitted: tuple[float, float, float] | None = None

    def hear(self, before: int, tokens: int, seconds: float) -> None:
        """A call took so long."""
        self._calls.setdefault(tokens.bit_length(), deque(maxlen=KEPT)).append((before, tokens, seconds))
        self._fitted = None

    def call_s(self, before: int, tokens: int) -> float | None:
        """See `PrefillTime`. Not known before a prompt was measured, nor of contexts that are much longer than all."""
        prompts = [call for calls in self._calls.values() for call in calls if call[1] >= LEAST_TOKENS]
        if before + tokens > REACH * max((one + more for one, more, _ in prompts), default=0):
            return None
        if self._fitted is None:
            self._fitted = _fit([list(calls) for calls in self._calls.values()])
        each, token, attended = self._fitted
        return each + tokens * (token + attended * (before + tokens / 2))


def _fit(groups: Sequence[Sequence[tuple[int, int, float]]]) -> tuple[float, float, float]:
    """The coefficients, none below 0, with the least sum of squares of relative errors; groups count alike.

    All ways to leave some out are tried: least squares of three columns are best where those that remain are positive.
    Of ways that are as good the simplest is taken, and of single ones that by tokens.
    """
    rows, weights = [], []
    for calls in groups:
        for before, tokens, seconds in calls:
            weight = 1 / (max(seconds, 1e-9) * len(calls) ** 0.5)
            rows.append([weight, weight * tokens, weight * tokens * (before + tokens / 2)])
            weights.append(weight * seconds)
    matrix, wanted = np.array(rows), np.array(weights)
    sizes = np.linalg.norm(matrix, axis=0)  # columns differ by powers of ten
    matrix = matrix / sizes
    best, least = (0.0, 0.0, 0.0), float("inf")
    ways: list[tuple[int, ...]] = [(1,), (0,), (2,), *combinations(range(3), 2), (0, 1, 2)]
    for way in ways:
        if len(way) > len(rows):
            continue
        found = np.linalg.lstsq(matrix[:, way], wanted, rcond=None)[0]
        error = float(((matrix[:, way] @ found - wanted) ** 2).sum())
        if (found >= 0).all() and error < least - 1e-9:
            coefficients = [0.0, 0.0, 0.0]
            for column, value in zip(way, found, strict=True):
                coefficients[column] = float(value / sizes[column])
            best, least = (coefficients[0], coefficients[1], coefficients[2]), error
    return best
