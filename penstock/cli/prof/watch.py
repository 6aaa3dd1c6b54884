"""What is known of a running recording: the parts read so far, kept as far back as its rates look."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ...runtime.profiler.profile import Column, Columns
from ...runtime.profiler.schema import (
    Category,
    Compute,
    Footer,
    Gauge,
    Header,
    Link,
    Memory,
    Meter,
    Record,
    Step,
    Tier,
    Transfer,
    Wait,
)
from ...runtime.profiler.tokens import tokens_made

if TYPE_CHECKING:
    from ...runtime.profiler.profile import Profile

WINDOW_NS: Final = 5_000_000_000
"""Rates and shares are of this long before the last record."""
_METERS: Final = {
    Tier.DEVICE: (Meter.DEVICE_USED, Meter.DEVICE_RESERVED, Meter.DEVICE_ALLOCATED),
    Tier.HOST: (Meter.HOST_RSS, Meter.HOST_ANONYMOUS),
}
"""What a tier holds is what the first of these says that was read; else the sum of its memory records."""
_TIMES: Final[dict[type[Record], str]] = {Step: "end", Compute: "end", Transfer: "end", Wait: "ready"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TierNow:
    """One tier."""

    name: str
    nbytes: int
    """All that is held of it."""
    limit_nbytes: int | None
    """The budget; where there is none, the capacity."""
    before_nbytes: int = 0
    """What of it the process held before the recording, where the limit is a budget: that bounds only what came on
    top."""

    @property
    def counted_nbytes(self) -> int:
        """What the limit bounds."""
        return max(0, self.nbytes - self.before_nbytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkNow:
    """One link over the window."""

    name: str
    rate: float
    """Bytes per second."""
    peak: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Now:
    """The last moments of a recording."""

    tiers: tuple[TierNow, ...]
    links: tuple[LinkNow, ...]
    module: str
    """The one that computed last; "" for none yet."""
    phase: str
    steps: int
    """Since the recording began."""
    tokens_per_s: float | None
    stall: float | None
    """Share of the window in which somebody waited for a block."""
    elapsed_ns: int
    dropped: int
    overhead: float | None
    """The recorder's own CPU time / time since the recording began."""
    ended: bool
    failure: str


class Watch:
    """Takes the parts of one recording in order."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._header: Header | None = None
        self._footer: Footer | None = None
        self._recent: dict[type[Record], Columns] = {}
        self._live: Counter[Tier] = Counter()
        self._before: Counter[Tier] = Counter()
        """What there was before the recording."""
        self._gauges: dict[Meter, int] = {}
        self._strings: dict[int, str] = {}
        """Names of phases."""
        self._module, self._phase = "", ""
        self._steps = self._newest = 0

    def add(self, part: Profile) -> None:
        """What was recorded since the part before. A part of another run starts anew: its file was overwritten."""
        if self._header is not None and part.header.run != self._header.run:
            self._forget()
        self._header = part.header
        self._footer = part.footer
        self._newest = max(self._newest, part.span()[1], part.footer.written_ns)
        self._steps += len(part[Step])
        self._note_names(part)
        self._note_memory(part)
        for kind, end in _TIMES.items():
            known = [self._recent[kind]] if kind in self._recent else []
            joined = Columns.joined(kind, [*known, part[kind]])
            self._recent[kind] = joined.where(getattr(joined, end) > self._newest - WINDOW_NS)

    @property
    def ended(self) -> bool:
        """Whether the recording came to its end in order."""
        return self._footer is not None and self._footer.last

    def now(self) -> Now | None:
        """The last moments; None before the first part."""
        if self._header is None or self._footer is None:
            return None
        first = max(self._header.began_ns, self._newest - WINDOW_NS)
        window = self._newest - first
        elapsed = self._newest - self._header.began_ns
        waits = self._recent[Wait]
        stalled = _covered_ns(waits.needed, waits.ready, first)
        return Now(
            tiers=self._tiers(self._header),
            links=self._links(self._header, window),
            module=self._module,
            phase=self._phase,
            steps=self._steps,
            tokens_per_s=self._tokens_per_s(),
            stall=stalled / window if window > 0 else None,
            elapsed_ns=elapsed,
            dropped=self._footer.dropped,
            overhead=self._footer.own_ns / elapsed if elapsed > 0 else None,
            ended=self._footer.last,
            failure=self._footer.failure,
        )

    def _note_names(self, part: Profile) -> None:
        compute, steps = part[Compute], part[Step]
        if len(compute):
            # Outer modules end last; the innermost say more.
            innermost = compute.where(compute.depth == compute.depth.max())
            self._module = part.module_path(int(innermost.module[int(innermost.end.argmax())]))
        if len(steps):
            self._phase = part.string(int(steps.phase[int(steps.end.argmax())]))
            self._strings |= {number: part.string(number) for number in set(steps.phase.tolist())}

    def _note_memory(self, part: Profile) -> None:
        memory, gauges = part[Memory], part[Gauge]
        for tier in Tier:
            here = memory.tier == tier
            self._live[tier] += int(memory.nbytes[here].sum())
            self._before[tier] += int(memory.nbytes[here & (memory.category == Category.BASELINE)].sum())
        for meter in Meter:
            read = gauges.where(gauges.meter == meter)
            if len(read):
                self._gauges[meter] = int(read.value[int(read.at.argmax())])

    def _tiers(self, header: Header) -> tuple[TierNow, ...]:
        found = []
        for tier in Tier:
            read = [self._gauges[meter] for meter in _METERS.get(tier, ()) if meter in self._gauges]
            nbytes = read[0] if read else self._live[tier]
            budget = header.budgets.get(tier.name)
            if nbytes or budget is not None:
                found.append(
                    TierNow(
                        name=tier.name.lower(),
                        nbytes=nbytes,
                        limit_nbytes=header.capacities.get(tier.name) if budget is None else budget,
                        before_nbytes=0 if budget is None else self._before[tier],
                    )
                )
        return tuple(found)

    def _links(self, header: Header, window: int) -> tuple[LinkNow, ...]:
        transfers = self._recent[Transfer]
        found = []
        for link in Link:
            nbytes = int(transfers.nbytes[transfers.link == link].sum())
            peak = header.peaks.get(link.name)
            if nbytes or peak is not None:
                rate = nbytes * 1e9 / window if window > 0 else 0.0
                found.append(LinkNow(name=link.name.lower(), rate=rate, peak=peak))
        return tuple(found)

    def _tokens_per_s(self) -> float | None:
        steps = self._recent[Step]
        steps = steps.where(steps.tokens > 0)
        if not len(steps):
            return None
        tokens = int(tokens_made(steps, lambda number: self._strings.get(number, "")).sum())
        return tokens * 1e9 / max(int(steps.end.max() - steps.start.min()), 1)


def _covered_ns(starts: Column, ends: Column, first: int) -> int:
    """Nanoseconds after `first` that any of the spans covers."""
    order = np.argsort(starts)
    starts, ends = np.maximum(starts[order], first), np.maximum.accumulate(ends[order])
    if not len(starts):
        return 0
    before = np.maximum(np.append(np.int64(first), ends[:-1]), first)
    return int(np.maximum(ends - np.maximum(starts, before), 0).sum())
