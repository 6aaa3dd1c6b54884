"""What `penstock prof stats` shows when nothing else is asked for: the verdict first, then its reasons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from rich.console import RenderableType
from rich.text import Text

from ...runtime.profiler import units
from .plain import plain
from .tables import add, category_tables, link_table, module_table, share, table

if TYPE_CHECKING:
    from ...runtime.profiler.profile import Profile
    from ...runtime.profiler.summary import ExpertUse, Summary, TierPeak

_CAUSES: Final = {
    "disk": "a block was still being read",
    "link": "a block was on its way to the device",
    "space": "a block had no slot yet",
    "host": "the blocks were there, the processor was not asked",
    "other": "no block was needed",
}


def overview(profile: Profile, summary: Summary, top: int, *, wide: bool) -> Iterator[RenderableType]:
    """Lines and tables from the verdict down to the modules; `top` rows of each list, `wide` or narrow."""
    yield Text(plain(summary.verdict), style="bold")
    yield Text()
    yield from (_row(name, value) for name, value in _facts(profile, summary))
    yield Text()
    yield _bubble(summary)
    if summary.links:
        yield link_table(summary)
    if summary.prefetch.uses:
        yield _prefetch(summary)
    if summary.experts is not None:
        yield _experts(summary.experts)
    yield from category_tables(summary, top)
    if summary.modules:
        yield module_table(summary, top, wide=wide)
    for leak in summary.leaks:
        where = f", most of it in {leak.module}" if leak.module else ""
        grows = f"{leak.tier.lower()} grows by {units.size(leak.nbytes_per_step)} per step over {leak.steps} steps"
        yield Text(plain(f"leak: {grows}{where}"), style="red")
    yield _row("recorded", _recorded(summary))


def _facts(profile: Profile, summary: Summary) -> Iterator[tuple[str, str]]:
    first, last = summary.window_ns
    yield "command", " ".join(profile.header.argv)
    yield "window", f"{units.duration(last - first)}, {_counted(summary.steps, 'step')}"
    if summary.step_ns is not None:
        yield "step", f"{units.duration(summary.step_ns)} (median)"
    if summary.tokens_per_s is not None:
        yield "tokens", f"{summary.tokens}, {summary.tokens_per_s:.2f} per second"
    if summary.distance is not None and summary.bound_ns is not None:
        bound = f"{units.duration(summary.bound_ns)}, by {summary.binds.lower()}"
        yield "distance", f"{summary.distance:.2f} (time / least time possible, which is {bound})"
    for peak in summary.peaks:
        yield f"{peak.tier.lower()} peak", _peak(peak)
        if peak.fragmentation_nbytes is not None:
            yield "", f"{units.size(peak.fragmentation_nbytes)} of it not in use; named is a share of the rest"
    if summary.energy.per_token_j is not None:
        yield "energy", f"{summary.energy.per_token_j:.2f} J per token"
    if summary.tklqt_ns is not None:
        of = _counted(summary.tklqt_steps, "step") if summary.tklqt_steps else "a part of a step"
        launches = _counted(summary.tklqt_launches, "launch", "launches")
        yield "queued", f"{units.duration(summary.tklqt_ns)} from launch to start, over {launches} of {of} (TKLQT)"
    if summary.behind_ns is not None:
        yield "behind", f"{units.duration(summary.behind_ns)} from a module's call to its start on the device (median)"


def _peak(peak: TierPeak) -> str:
    parts = [units.size(peak.nbytes)]
    if peak.budget_nbytes is not None:
        parts.append(f"{units.size(peak.growth_nbytes)} above the baseline, budget {units.size(peak.budget_nbytes)}")
    if peak.capacity_nbytes is not None:
        parts.append(f"capacity {units.size(peak.capacity_nbytes)}")
    return "; ".join([*parts, f"{units.share(peak.named)} of it named"])


def _bubble(summary: Summary) -> RenderableType:
    made = table(f"Time without computing: {share(summary.bubble)}", ("cause", "meaning"), ("time", "share of it"))
    total = summary.idle.total
    for cause, meaning in _CAUSES.items():
        ns = getattr(summary.idle, cause)
        add(made, cause, meaning, units.duration(ns), share(ns / total if total else None))
    return made


def _prefetch(summary: Summary) -> RenderableType:
    use = summary.prefetch
    made = table("Prefetch", ("figure", "meaning"), ("value",))
    lead = "–" if use.median_lead_ns is None else units.duration(use.median_lead_ns)
    for name, meaning, value in (
        ("on time", f"uses that did not wait, of {use.uses}", share(use.on_time)),
        ("streamed on time", f"of the {use.streamed_uses} whose block was brought", share(use.streamed_on_time)),
        ("waited", "sum of all waits", units.duration(use.waited_ns)),
        ("lead", "from deciding to bring a block to its use, median", lead),
        ("wasted", "bytes brought and never used", share(use.wasted)),
        ("early", "memory spent on being early, MiB × s", f"{use.early_byte_seconds / 2**20:.2f}"),
    ):
        add(made, name, meaning, value)
    return made


def _experts(use: ExpertUse) -> RenderableType:
    made = table("Experts", ("figure", "meaning"), ("parts", "share of uses"))
    for name, meaning, count in (
        ("hits", "there when the layer asked, and kept since an earlier use", use.hits),
        ("ahead, in time", "brought before the layer asked, and there", use.ahead_in_time),
        ("ahead, late", "brought before the layer asked, and still on the way", use.ahead_late),
        ("misses", "brought because the layer asked", use.missed),
    ):
        add(made, name, meaning, str(count), share(count / use.uses if use.uses else None))
    add(made, "for nothing", "brought ahead, and the layer did not ask", str(use.ahead_for_nothing), "–")
    return made


def _recorded(summary: Summary) -> str:
    lost = f"{summary.dropped} lost" if summary.dropped else "none lost"
    cost = "" if summary.overhead is None else f"; recording took {summary.overhead * 100:.2f}% of the time"
    return f"{_counted(summary.recorded, 'record')}, {lost}{cost}"


def _counted(count: int, noun: str, several: str = "") -> str:
    return f"{count} {noun if count == 1 else several or noun + 's'}"


def _row(name: str, value: str) -> Text:
    return Text.assemble((f"{name:<13}", "cyan"), plain(value))
