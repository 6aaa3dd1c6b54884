"""Whether a hit of a prefix store is read, or computed once more: what both take here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ...memory.prefix import PrefixHit, PrefixStore
from ...scheduler.kv.prefilltime import PrefillTime, prefill_s
from ...scheduler.kv.reuse import ReadTime, Reuse, reuse
from .cache import TieredCache

MEASURED: Final = 4 * 2**20
"""Bytes that a store must have read before its rate is believed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixCosts:
    """What a calibration says. What it does not say is learned from calls and reads of this process."""

    prefill: PrefillTime | None = None
    """Of calls of the model."""
    reading: ReadTime | None = None
    """Of the store's drive, as long as this process has not read enough from it itself."""
    chunk_tokens: int | None = None
    """Of a prompt that are computed in a call, at most; None for all."""


class PrefixChoice:
    """Decides what of a hit is read.

    Args:
        cache: Knows what calls of its model took.
        store: Knows what its reads took.
        costs: Of the machine.
        hit: What was found.
        tokens: Of the whole prompt.
    """

    def __init__(self, cache: TieredCache, store: PrefixStore, costs: PrefixCosts, hit: PrefixHit, tokens: int) -> None:
        self._prefill: PrefillTime = cache.prefills if costs.prefill is None else costs.prefill
        self._chunk = costs.chunk_tokens
        self._tokens = tokens
        self._hit = hit
        self._start_s = 0.0 if costs.reading is None else costs.reading.start_s
        self._reading = costs.reading
        figures = store.statistics()
        if figures.read_nbytes >= MEASURED and figures.read_s > 0:
            self._reading = ReadTime(rate=figures.read_nbytes / figures.read_s, start_s=self._start_s)

    def first(self) -> Reuse | None:
        """What to read before anything is; None where that is not known, which is to read all."""
        return None if self._reading is None else self._choose(0, len(self._hit.places), self._reading)

    def goes_on(self, done: int, wanted: int, nbytes: int, seconds: float) -> bool:
        """Whether the rest is still worth reading after so many blocks, at the rate that was seen, or a better one."""
        if done == wanted or seconds <= 0:
            return True
        found = self._choose(done, wanted, ReadTime(rate=nbytes / seconds))
        return found is None or found.read_blocks > 0

    def _choose(self, done: int, wanted: int, reading: ReadTime) -> Reuse | None:
        places = self._hit.places
        if done == wanted or prefill_s(self._prefill, 0, self._tokens, chunk=self._chunk) is None:
            return None
        size = self._hit.tokens // len(places)

        def rest_s(tokens: int) -> float:
            found = prefill_s(self._prefill, done * size + tokens, self._tokens, chunk=self._chunk)
            assert found is not None, tokens
            return found

        return reuse(
            wanted - done,
            block_tokens=size,
            block_nbytes=self._hit.nbytes // len(places),
            reading=reading,
            prefill_s=rest_s,
        )
