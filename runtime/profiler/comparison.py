"""Two runs side by side: which figures changed, by how much, and whether for the worse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from . import units
from .summary import ModuleUse, Summary

Unit = Literal["ns", "bytes", "share", "ratio", "rate", "per_s", "joules"]
Better = Literal["less", "more"]

_TEXT: Final = {
    "ns": units.duration,
    "bytes": units.size,
    "share": units.share,
    "ratio": "{:.2f}".format,
    "rate": units.rate,
    "per_s": "{:.2f}/s".format,
    "joules": "{:.2f} J".format,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure of a run."""

    name: str
    value: float | None
    """None where it cannot be said."""
    unit: Unit
    better: Better
    gates: bool
    """Whether a change for the worse may fail a check. The others explain."""
    link: str = ""
    """Name of the link it is about. A run in which that link moved nothing lacks the figure and is none the worse."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One figure in two runs."""

    name: str
    unit: Unit
    better: Better
    gates: bool
    link: str
    before: float | None
    after: float | None

    @property
    def change(self) -> float | None:
        """Relative change; for shares the difference, in points of 1. None where either side is missing or a ratio to
        nothing."""
        if self.before is None or self.after is None:
            return None
        if self.unit == "share":
            return self.after - self.before
        if self.before == 0:
            return 0.0 if self.after == 0 else None
        return (self.after - self.before) / abs(self.before)

    @property
    def worsening(self) -> float:
        """By how much it is worse: 0 where it is not or cannot be said, infinite where it was nothing before."""
        if self.before is None or self.after is None:
            return 0.0
        change = self.change
        if change is None:
            change = math.copysign(math.inf, self.after)
        return max(0.0, change if self.better == "less" else -change)

    @property
    def change_text(self) -> str:
        """The change in words: "+5.0%", "-3.0 points", "" where it cannot be said."""
        if self.change is None:
            return ""
        return f"{self.change * 100:+.1f}{' points' if self.unit == 'share' else '%'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleChange:
    """One module in two runs: nanoseconds and bytes per step (of everything where a run has no steps)."""

    path: str
    self_before: float
    """Its spans without those of modules inside it. Where a module waits inside another's span, that one's time grows
    too: so waits are told apart."""
    self_after: float
    waited_before: float
    waited_after: float
    moved_before: float
    """Bytes over all links."""
    moved_after: float

    @property
    def change_ns(self) -> float:
        """The larger of the two changes: of waiting, and of its own time."""
        waited, itself = self.waited_after - self.waited_before, self.self_after - self.self_before
        return waited if abs(waited) >= abs(itself) else itself


def text(value: float | None, unit: Unit) -> str:
    """A figure in words; "–" for what cannot be said."""
    return "–" if value is None else _TEXT[unit](value)


def figures(summary: Summary) -> tuple[Figure, ...]:
    """The figures of one run that two runs can be compared by, those that gate first."""
    found = (*_overall(summary), *_of_links(summary), *_of_tiers(summary))
    return tuple(sorted(found, key=lambda figure: not figure.gates))


def compare(before: Summary, after: Summary) -> tuple[Change, ...]:
    """Each figure that either run has."""
    first = {figure.name: figure for figure in figures(before)}
    second = {figure.name: figure for figure in figures(after)}
    changes = []
    for name, kind in {**first, **second}.items():
        old, new = first.get(name), second.get(name)
        change = Change(
            name=name,
            unit=kind.unit,
            better=kind.better,
            gates=kind.gates,
            link=kind.link,
            before=None if old is None else old.value,
            after=None if new is None else new.value,
        )
        if change.before is not None or change.after is not None:
            changes.append(change)
    return tuple(changes)


def compare_modules(before: Summary, after: Summary) -> tuple[ModuleChange, ...]:
    """Each module that either run has, the largest change first, waiting before the rest."""
    first = {module.path: module for module in before.modules}
    second = {module.path: module for module in after.modules}
    changes = []
    for path in {**first, **second}:
        old = _per_step(first.get(path), before.steps)
        new = _per_step(second.get(path), after.steps)
        changes.append(
            ModuleChange(
                path=path,
                self_before=old[0],
                self_after=new[0],
                waited_before=old[1],
                waited_after=new[1],
                moved_before=old[2],
                moved_after=new[2],
            )
        )
    return tuple(sorted(changes, key=_magnitude))


def _magnitude(change: ModuleChange) -> tuple[float, float, str]:
    return -abs(change.change_ns), -abs(change.waited_after - change.waited_before), change.path


def _per_step(module: ModuleUse | None, steps: int) -> tuple[float, float, float]:
    if module is None:
        return 0.0, 0.0, 0.0
    count = max(steps, 1)
    return module.self_ns / count, module.waited_ns / count, sum(module.moved_nbytes.values()) / count


def _overall(summary: Summary) -> Iterator[Figure]:
    steps = max(summary.steps, 1)
    yield Figure(name="time per step", value=summary.step_ns, unit="ns", better="less", gates=True)
    yield Figure(name="tokens per second", value=summary.tokens_per_s, unit="per_s", better="more", gates=True)
    yield Figure(name="bubble", value=summary.bubble, unit="share", better="less", gates=True)
    yield Figure(name="distance", value=summary.distance, unit="ratio", better="less", gates=True)
    yield Figure(name="on time", value=summary.prefetch.on_time, unit="share", better="more", gates=True)
    for cause in ("disk", "link", "space", "host", "other"):
        ns = getattr(summary.idle, cause) / steps
        yield Figure(name=f"idle per step: {cause}", value=ns, unit="ns", better="less", gates=False)
    waited = summary.prefetch.waited_ns / steps
    yield Figure(name="waited per step", value=waited, unit="ns", better="less", gates=False)
    yield Figure(name="wasted", value=summary.prefetch.wasted, unit="share", better="less", gates=False)
    energy = summary.energy.per_token_j
    yield Figure(name="energy per token", value=energy, unit="joules", better="less", gates=False)


def _of_links(summary: Summary) -> Iterator[Figure]:
    steps = max(summary.steps, 1)
    for use in summary.links:
        link = use.link.lower()
        yield Figure(name=f"{link} overlap", value=use.overlap, unit="share", better="more", gates=True, link=use.link)
        yield Figure(
            name=f"{link} bandwidth", value=use.bandwidth, unit="rate", better="more", gates=False, link=use.link
        )
        yield Figure(
            name=f"{link} bytes per step",
            value=use.nbytes / steps,
            unit="bytes",
            better="less",
            gates=False,
            link=use.link,
        )


def _of_tiers(summary: Summary) -> Iterator[Figure]:
    for peak in summary.peaks:
        yield Figure(
            name=f"{peak.tier.lower()} peak",
            value=peak.nbytes,
            unit="bytes",
            better="less",
            gates=peak.tier.upper() != "DISK",
        )
