"""Limits that a run must keep, and the sentence that says so or says what to change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from ...memory.errors import UsageError
from . import units
from .comparison import Change, compare, text
from .schema import Link, Tier
from .summary import Leak, LinkUse, Summary, TierPeak
from .waste import WASTEFUL

_LEAST_STEPS: Final = 3
"""Fewer say nothing about growth."""
_REMEDIES: Final = {
    "disk": "blocks were still being read: more host memory keeps more of them off the disk",
    "link": "blocks were on their way to the device: a larger device budget leaves less to copy",
    "space": "blocks had no slot yet: a larger budget, or a smaller context or batch, gives the ring more slots",
    "host": "the processor was not asked to compute: larger batches, or less Python between layers",
    "other": "no block was needed: leave start and end out by recording steps only",
}
"""By cause of idle time: what it means and what helps."""
_MOVING: Final = ("disk", "link", "space")
"""Causes that moving less for nothing makes smaller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a run is held to. None: not limited.

    Raises:
        UsageError: a value that no run can be held to, or a link that does not exist.
    """

    device_peak: int | None = None
    """Bytes on the device at most."""
    host_peak: int | None = None
    """Bytes of host memory at most: the whole process."""
    max_bubble: float | None = None
    """Share of the time without computing, at most."""
    max_distance: float | None = None
    """Time / bound, at most."""
    min_on_time: float | None = None
    """Share of uses that did not wait, at least."""
    min_overlap: Mapping[str, float] = field(default_factory=dict)
    """By name of link: share of its busy time during which something computed, at least."""
    no_leaks: bool = False
    """No live bytes may grow from step to step."""

    def __post_init__(self) -> None:
        shares = {"max_bubble": self.max_bubble, "min_on_time": self.min_on_time}
        shares.update({f"min_overlap of {name}": value for name, value in self.min_overlap.items()})
        for name, value in shares.items():
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"{name} is a share between 0 and 1 (0% and 100%), not {value:g}")
        if self.max_distance is not None and not (self.max_distance >= 1 and math.isfinite(self.max_distance)):
            raise UsageError(f"max_distance is time / the least time possible: at least 1, not {self.max_distance:g}")
        object.__setattr__(self, "min_overlap", {link_name(n): value for n, value in self.min_overlap.items()})

    @property
    def empty(self) -> bool:
        """Whether nothing is limited."""
        return self == Limits()


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """One limit, held against a run."""

    holds: bool
    sentence: str
    """The figure and its limit; where it does not hold, what to change too. One line."""


def link_name(text: str) -> str:
    """The name of a link in the schema, from one in any case: "h2d", "disk-read".

    Raises:
        UsageError: there is no such link.
    """
    name = text.strip().upper().replace("-", "_")
    if name not in Link.__members__:
        raise UsageError(f"there is no link {text!r}: links are {', '.join(link.name.lower() for link in Link)}")
    return name


def judge(summary: Summary, limits: Limits) -> tuple[Judgement, ...]:
    """Each limit held against a run. What cannot be measured does not hold: a check that checks nothing must not
    pass. A device that nothing was recorded of holds no bytes."""
    return tuple(_judge(summary, limits))


def judge_against(summary: Summary, baseline: Summary, tolerance: float) -> tuple[Judgement, ...]:
    """Each figure that counts held against an earlier run. Shares may fall behind by `tolerance` in points of 1, other
    figures by that part of what they were."""
    found = [_against(change, tolerance) for change in compare(baseline, summary) if _counts(change)]
    if not found:
        return (_untold("the baseline", "it has no figure to compare with; record it again with steps in it"),)
    return tuple(found)


def _judge(summary: Summary, limits: Limits) -> Iterator[Judgement]:
    for tier, peak_limit in ((Tier.DEVICE, limits.device_peak), (Tier.HOST, limits.host_peak)):
        if peak_limit is not None:
            yield _peak(summary, tier.name, peak_limit)
    if limits.max_bubble is not None:
        yield _bubble(summary, limits.max_bubble)
    if limits.max_distance is not None:
        yield _distance(summary, limits.max_distance)
    if limits.min_on_time is not None:
        yield _on_time(summary, limits.min_on_time)
    for link, least in limits.min_overlap.items():
        yield _overlap(link, next((use for use in summary.links if use.link == link), None), least)
    if limits.no_leaks:
        yield from _leaks(summary)


def _peak(summary: Summary, tier: str, limit: int) -> Judgement:
    name = f"{tier.lower()} peak"
    found: TierPeak | None = next((peak for peak in summary.peaks if peak.tier.upper() == tier), None)
    if found is None:
        if tier == Tier.DEVICE.name:
            return _kept(name, units.size(0), f"at most {units.size(limit)}")
        return _untold(name, "no memory of this tier was recorded; record a run that uses it")
    measured = units.size(found.nbytes)
    if found.nbytes <= limit:
        return _kept(name, measured, f"at most {units.size(limit)}")
    parts = ", ".join(f"{row.name.lower()} {units.size(row.nbytes)}" for row in found.categories[:3])
    largest = f" (largest: {parts})" if parts else ""
    return _broken(
        f"{name} {measured} is over the limit of {units.size(limit)} by {units.size(found.nbytes - limit)}: "
        f"lower the {tier.lower()} budget (max_memory) or what takes it{largest}"
    )


def _bubble(summary: Summary, limit: float) -> Judgement:
    if summary.bubble is None:
        return _untold("bubble", "nothing was computed in this run; record one that computes")
    measured, most = units.share(summary.bubble), units.share(limit)
    if summary.bubble <= limit:
        return _kept("bubble", measured, f"at most {most}")
    cause, part = _main_cause(summary)
    return _broken(f"bubble {measured} is over the limit of {most}: {units.share(part)} of it is {cause}")


def _main_cause(summary: Summary) -> tuple[str, float]:
    idle, wasted = summary.idle, summary.prefetch.wasted or 0.0
    cause = max(_REMEDIES, key=lambda name: getattr(idle, name))
    remedy = _REMEDIES[cause]
    if wasted > WASTEFUL and cause in _MOVING:
        meaning = remedy.partition(":")[0]
        remedy = f"{meaning}: {units.share(wasted)} of what was brought is never used, and the verdict tells why"
    return f"{cause}, where {remedy}", getattr(idle, cause) / max(idle.total, 1)


def _distance(summary: Summary, limit: float) -> Judgement:
    if summary.distance is None:
        return _untold(
            "distance",
            "nothing was computed in this run, so it has no bound; record one that computes",
        )
    measured, most = f"{summary.distance:.2f}", f"{limit:.2f}"
    if summary.distance <= limit:
        return _kept("distance", measured, f"at most {most}")
    cause, part = _main_cause(summary)
    return _broken(
        f"distance {measured} is over the limit of {most}: it took {measured} times what {summary.binds.lower()} "
        f"allows; {units.share(part)} of the idle time is {cause}"
    )


def _on_time(summary: Summary, limit: float) -> Judgement:
    measured = summary.prefetch.on_time
    if measured is None:
        return _untold("on time", "no block was used in this run; record a model that is streamed")
    if measured >= limit:
        return _kept("on time", units.share(measured), f"at least {units.share(limit)}")
    late = units.duration(summary.prefetch.waited_ns)
    return _broken(
        f"on time {units.share(measured)} is under the limit of {units.share(limit)}: {late} were waited for blocks; "
        "a larger budget keeps more of them and prefetches further ahead"
    )


def _overlap(link: str, use: LinkUse | None, limit: float) -> Judgement:
    name = f"{link.lower()} overlap"
    if use is None or use.overlap is None:
        return _untold(name, "this link moved nothing in this run; record one in which it does")
    measured = use.overlap
    if measured >= limit:
        return _kept(name, units.share(measured), f"at least {units.share(limit)}")
    return _broken(
        f"{name} {units.share(measured)} is under the limit of {units.share(limit)}: {units.duration(use.exposed_ns)} "
        "of moving had no compute beside it; a larger budget prefetches further ahead, a larger batch computes longer"
    )


def _leaks(summary: Summary) -> Iterator[Judgement]:
    if summary.steps < _LEAST_STEPS:
        yield _untold(
            "leaks", f"growth takes {_LEAST_STEPS} steps to see, and {summary.steps} were recorded; record more"
        )
    elif not summary.leaks:
        yield Judgement(holds=True, sentence=f"no leaks in {summary.steps} steps")
    for leak in summary.leaks:
        yield _broken(_leak(leak))


def _leak(leak: Leak) -> str:
    where = f"in {leak.module}" if leak.module else "that outlive their step"
    return (
        f"{leak.tier.lower()} memory grows by {units.size(leak.nbytes_per_step)} per step over {leak.steps} steps, and "
        f"no growth is allowed: look for tensors kept {where}"
    )


def _counts(change: Change) -> bool:
    return change.gates and change.before is not None and not (change.link and change.after is None)


def _against(change: Change, tolerance: float) -> Judgement:
    before, after = text(change.before, change.unit), text(change.after, change.unit)
    if change.after is None:
        return _untold(change.name, f"the baseline has {before}; record both runs alike")
    allowed = f"{tolerance * 100:g}{' points' if change.unit == 'share' else '%'}"
    by = f" ({change.change_text})" if change.change_text else ""
    if change.worsening <= tolerance:
        return Judgement(holds=True, sentence=f"{change.name} {after}, baseline {before}{by}")
    return _broken(
        f"{change.name} {after} is worse than the baseline's {before}{by}, and {allowed} are tolerated: compare the "
        "two with penstock prof diff, or record a new baseline if the change is meant"
    )


def _kept(name: str, measured: str, limit: str) -> Judgement:
    return Judgement(holds=True, sentence=f"{name} {measured} ({limit})")


def _broken(sentence: str) -> Judgement:
    return Judgement(holds=False, sentence=sentence)


def _untold(name: str, why: str) -> Judgement:
    return Judgement(holds=False, sentence=f"{name} cannot be told: {why}")
