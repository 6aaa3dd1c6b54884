"""The last moments of a recording, drawn: bars for tiers and links, a line each for what runs and what waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ...runtime.profiler import units
from .plain import plain
from .watch import LinkNow, Now, TierNow

_BAR_COLUMNS: Final = 24
_TIGHT: Final = 0.9
"""A bar that is fuller than this is red."""


def draw(now: Now | None, title: str) -> RenderableType:
    """What `penstock prof live` shows at one moment; None: nothing was recorded yet."""
    if now is None:
        return Text(f"{plain(title)}: nothing recorded yet")
    state = "" if not now.ended else f", ended{f' by {now.failure}' if now.failure else ''}"
    heading = f"{title}: {units.duration(now.elapsed_ns)}, step {now.steps}{f' ({now.phase})' if now.phase else ''}"
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(width=_BAR_COLUMNS)
    grid.add_column(no_wrap=True)
    for cells in (*map(_tier, now.tiers), *map(_link, now.links)):
        grid.add_row(*cells)
    lines = [Text.assemble((f"{name:<13}", "cyan"), plain(value)) for name, value in _lines(now)]
    return Group(Text(plain(heading + state), style="bold"), grid, *lines)


def _tier(tier: TierNow) -> tuple[RenderableType, ...]:
    if not tier.limit_nbytes:
        return Text(tier.name, style="cyan"), Text(), Text(units.size(tier.nbytes))
    part = tier.counted_nbytes / tier.limit_nbytes
    said = f"{units.size(tier.counted_nbytes)} of {units.size(tier.limit_nbytes)} ({units.share(part)})"
    if tier.before_nbytes:
        said += f"\non top of {units.size(tier.before_nbytes)} from before"
    return Text(tier.name, style="cyan"), _bar(part, "red" if part > _TIGHT else "green"), Text(said)


def _link(link: LinkNow) -> tuple[RenderableType, ...]:
    if not link.peak:
        return Text(link.name, style="cyan"), Text(), Text(units.rate(link.rate))
    part = link.rate / link.peak
    said = f"{units.rate(link.rate)} of {units.rate(link.peak)} ({units.share(part)})"
    return Text(link.name, style="cyan"), _bar(part, "blue"), Text(said)


def _bar(part: float, style: str) -> ProgressBar:
    return ProgressBar(total=1.0, completed=min(max(part, 0.0), 1.0), complete_style=style, finished_style=style)


def _lines(now: Now) -> Iterator[tuple[str, str]]:
    yield "module", now.module or "–"
    if now.tokens_per_s is not None:
        yield "tokens/s", f"{now.tokens_per_s:.2f}"
    yield "stall", "–" if now.stall is None else f"{units.share(now.stall)} of the time somebody waits for a block"
    if now.dropped:
        yield "lost", f"{now.dropped} records"
    if now.overhead is not None:
        yield "recording", f"takes {now.overhead * 100:.2f}% of the time"
