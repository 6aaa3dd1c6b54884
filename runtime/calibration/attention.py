"""How many bytes of keys and values per second attention takes, by rows that use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Final

import torch
from torch.nn import functional

from ...scheduler.curves import Curve
from .sampling import Clock, curve, in_turns
from .timing import Timer

HEADS: Final = 8
"""Of keys and values."""
WIDTH: Final = 128
"""Of each head."""
SAMPLE_S: Final = 0.01
LONGEST_S: Final = 0.025
LEAST_KEYS: Final = 256
CPU_KEYS: Final = 4096
GPU_KEYS: Final = 16384
"""Of one cache: 64 MiB in two bytes."""
MOST_SCORES: Final = 2**25
"""Queries times keys, over all heads: where torch has no better way, all of them are in memory at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One way to use keys and values."""

    queries: int
    group: int
    """Query heads per key-value head."""

    @property
    def rows(self) -> int:
        """That use each key and value."""
        return self.queries * self.group


LENGTHS: Final = (128, 512, 2048)
"""Tokens of the sequences whose attention goes backward."""
LONGEST_BACK_S: Final = 0.04
"""A backward should not last longer: with many tokens, fewer heads show the same rate."""
POINTS: Final = (
    Point(queries=1, group=1),
    Point(queries=1, group=4),
    Point(queries=1, group=8),
    Point(queries=32, group=1),
    Point(queries=128, group=1),
    Point(queries=512, group=1),
    Point(queries=2048, group=1),
)
"""Decoding, without and with groups of heads, then prefill."""


class Attention:
    """Attention at one point, each call with other keys and values than the one before.

    Args:
        caches: Room for keys and for values.
        point: The queries.
        timer: Of the device.
    """

    def __init__(self, caches: Sequence[tuple[torch.Tensor, torch.Tensor]], point: Point, timer: Timer) -> None:
        self._caches = caches
        self._timer = timer
        self._grouped = point.group > 1
        room = caches[0][0]
        most = min(room.numel() // (HEADS * WIDTH), MOST_SCORES // (HEADS * point.rows))
        shape = (1, HEADS * point.group, point.queries, WIDTH)
        self._query = torch.full(shape, 0.02, dtype=room.dtype, device=room.device)
        self._at = 0
        self._calls = 1
        self._keys = min(LEAST_KEYS, most)
        self.once()  # the first of a shape chooses its kernel
        fitting = int(LONGEST_S * self.once() / (2 * HEADS * WIDTH * room.dtype.itemsize))
        self._keys = max(min(fitting // LEAST_KEYS * LEAST_KEYS, most), self._keys)
        self.once()
        self._calls = max(1, min(round(SAMPLE_S * self.once() / self._nbytes()), 1000))

    def once(self) -> float:
        """Bytes of keys and values per second of one repetition."""
        return self._calls * self._nbytes() / self._timer.seconds(self._repeat)

    def _nbytes(self) -> int:
        return 2 * HEADS * WIDTH * self._keys * self._query.dtype.itemsize

    def _repeat(self) -> None:
        for _ in range(self._calls):
            keys, values = (self._part(room) for room in self._caches[self._at % len(self._caches)])
            self._at += 1
            functional.scaled_dot_product_attention(self._query, keys, values, enable_gqa=self._grouped)

    def _part(self, room: torch.Tensor) -> torch.Tensor:
        """As many keys or values as are used, with the strides that they would have alone."""
        return room[: HEADS * self._keys * WIDTH].view(1, HEADS, self._keys, WIDTH)


@torch.no_grad()
def attention_curve(
    device: torch.device,
    dtype: torch.dtype,
    *,
    nbytes: int,
    seconds: float,
    timer: Timer,
    clock: Clock = perf_counter,
    points: Sequence[Point] = POINTS,
) -> Curve:
    """Bytes of keys and values per second by rows that use each of them.

    Args:
        device: What computes.
        dtype: Of queries, keys and values.
        nbytes: Of keys and values, more than the caches hold.
        seconds: About so long.
        timer: Of the device.
        clock: Seconds since any moment, for `seconds` only.
        points: Ascending in rows.

    Raises:
        RuntimeError: this torch cannot attend in that dtype here.
    """
    per_key = 2 * HEADS * WIDTH * dtype.itemsize
    keys = max(min(GPU_KEYS if device.type == "cuda" else CPU_KEYS, nbytes // (2 * per_key)), LEAST_KEYS)
    numbers = HEADS * keys * WIDTH
    caches = [
        (
            torch.full((numbers,), 0.02, dtype=dtype, device=device),
            torch.full((numbers,), 0.5, dtype=dtype, device=device),
        )
        for _ in range(max(nbytes // (per_key * keys), 1))
    ]
    measured: dict[float, Callable[[], float]] = {p.rows: Attention(caches, p, timer).once for p in points}
    return curve(in_turns(measured, seconds=seconds, clock=clock, pick=max))


class AttentionBack:
    """The backward of a sequence's attention to itself, causal as decoders are trained.

    Args:
        length: Tokens.
        timer: Of the device.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, length: int, timer: Timer) -> None:
        self._timer = timer
        self._length = length
        self._build(device, dtype, heads=1)
        each = timer.seconds(self._repeat)
        self._build(device, dtype, heads=max(1, min(int(LONGEST_BACK_S / max(each, 1e-9)), HEADS)))

    def _build(self, device: torch.device, dtype: torch.dtype, *, heads: int) -> None:
        shape = (1, heads, self._length, WIDTH)
        made = [torch.full(shape, value, dtype=dtype, device=device) for value in (0.02, 0.02, 0.5)]
        self._inputs = [each.requires_grad_() for each in made]
        query, key, value = self._inputs
        with torch.enable_grad():
            self._result = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        self._gradient = torch.full(shape, 0.1, dtype=dtype, device=device)
        self._repeat()  # the first of a shape chooses its kernel

    def once(self) -> float:
        """Bytes of keys and values per second of one repetition."""
        return 2 * self._inputs[1].nbytes / self._timer.seconds(self._repeat)

    def _repeat(self) -> None:
        torch.autograd.grad(self._result, self._inputs, self._gradient, retain_graph=True)


def attention_back_curve(
    device: torch.device,
    dtype: torch.dtype,
    *,
    seconds: float,
    timer: Timer,
    clock: Clock = perf_counter,
    lengths: Sequence[int] = LENGTHS,
) -> Curve:
    """Bytes of keys and values per second that the backward of attention takes, by rows that use each of them: tokens.

    Args:
        device: What computes.
        dtype: Of queries, keys and values.
        seconds: About so long.
        timer: Of the device.
        clock: Seconds since any moment, for `seconds` only.
        lengths: Ascending.

    Raises:
        RuntimeError: this torch cannot attend in that dtype here.
    """
    measured: dict[float, Callable[[], float]] = {
        length: AttentionBack(device, dtype, length, timer).once for length in lengths
    }
    return curve(in_turns(measured, seconds=seconds, clock=clock, pick=max))
