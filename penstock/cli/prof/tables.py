"""Figures as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...runtime.profiler import units
from .plain import plain

if TYPE_CHECKING:
    from ...runtime.profiler.comparison import Change, ModuleChange
    from ...runtime.profiler.summary import MemoryRow, Summary, TierPeak

_PIPE_COLUMNS: Final = 200
"""Where the output is no terminal, lines are as long as they need to be, up to this."""
_WIDE_COLUMNS: Final = 120
_NAME_COLUMNS: Final = 16
"""Names are folded, but not to less than this."""
_NOTABLE: Final = 0.005
"""Smaller changes are shown, but not called better or worse."""
_UNKNOWN: Final = "–"


def widen(console: Console) -> None:
    """Give tables room where nobody wraps them: in a file or a pipe."""
    if not console.is_terminal:
        console.width = _PIPE_COLUMNS


def has_room(console: Console) -> bool:
    """Whether there is room for the wide form of tables."""
    return console.width >= _WIDE_COLUMNS


def table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table: columns of words, then columns of figures."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in left:
        made.add_column(name, overflow="fold", min_width=min(_NAME_COLUMNS, max(len(name), 8)))
    for name in right:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def add(made: Table, *cells: str) -> None:
    """A row of plain text: names in a profile are no markup."""
    made.add_row(*(Text(plain(cell)) for cell in cells))


def share(value: float | None) -> str:
    """A share in per cent; "–" for none."""
    return _UNKNOWN if value is None else units.share(value)


def link_table(summary: Summary) -> Table:
    """A column per link that moved anything: there are four links at most, and more figures than a terminal is wide."""
    links = summary.links
    made = table("Links", ("figure",), [use.link.lower() for use in links])
    add(made, "transfers", *(str(use.transfers) for use in links))
    add(made, "bytes", *(units.size(use.nbytes) for use in links))
    add(made, "busy", *(units.duration(use.busy_ns) for use in links))
    add(made, "overlap", *(share(use.overlap) for use in links))
    add(made, "exposed", *(units.duration(use.exposed_ns) for use in links))
    add(made, "bandwidth", *(_rate(use.bandwidth) for use in links))
    add(made, "measured peak", *(_rate(use.peak) for use in links))
    add(made, "share of peak", *(share(use.efficiency) for use in links))
    amplifications = (use.amplification for use in links)
    add(made, "amplification", *(_UNKNOWN if value is None else f"{value:.2f}" for value in amplifications))
    return made


def module_table(summary: Summary, top: int, *, wide: bool) -> Table:
    """Modules: most waiting first, then most time. `wide` has more columns."""
    found = summary.modules
    title = _title("Modules", min(top, len(found)), len(found))
    more = ("class", "total", "backward") if wide else ()
    made = table(title, ("module", *more[:1]), ("calls", *more[1:], "itself", "waited", "moved", "peak"))
    for module in found[:top]:
        times = (units.duration(module.total_ns), units.duration(module.backward_ns)) if wide else ()
        add(
            made,
            module.path,
            *((module.kind,) if wide else ()),
            str(module.calls),
            *times,
            units.duration(module.self_ns),
            units.duration(module.waited_ns),
            units.size(sum(module.moved_nbytes.values())),
            units.size(sum(module.peak_nbytes.values())),
        )
    return made


def category_tables(summary: Summary, top: int) -> list[Table]:
    """For each tier at its peak: the bytes by category, then by module. What no record names has a row of its own."""
    made = []
    for peak in summary.peaks:
        tier = peak.tier.lower()
        made.append(_attribution(f"{tier}: peak by category", "category", peak, peak.categories, unaccounted=True))
        shown = peak.modules[:top]
        if shown:
            title = _title(f"{tier}: peak by module", len(shown), len(peak.modules))
            made.append(_attribution(title, "module", peak, shown, unaccounted=False))
    return made


def change_table(changes: Sequence[Change], before: str, after: str) -> Table:
    """Figures of two runs. What counts for a threshold comes first; * marks it."""
    from ...runtime.profiler.comparison import text

    made = table("Figures (* counts for a threshold)", ("figure",), (before, after, "change"))
    made.add_column("")
    for change in changes:
        verdict = Text("")
        if change.worsening > _NOTABLE:
            verdict = Text("worse", style="red")
        elif abs(change.change or 0) > _NOTABLE and not change.worsening:
            verdict = Text("better", style="green")
        made.add_row(
            Text(change.name + (" *" if change.gates else "")),
            Text(text(change.before, change.unit)),
            Text(text(change.after, change.unit)),
            Text(change.change_text or _UNKNOWN),
            verdict,
        )
    return made


def module_change_table(changes: Sequence[ModuleChange], total: int, *, wide: bool) -> Table:
    """Modules of two runs, per step; the largest change first. `wide` has more columns."""
    more = ("moved before", "after") if wide else ()
    title = _title("Modules, per step", len(changes), total)
    made = table(title, ("module",), ("itself before", "after", "waited before", "after", "change", *more))
    for change in changes:
        moved = (units.size(change.moved_before), units.size(change.moved_after))
        sign = "-" if change.change_ns < 0 else "+"
        add(
            made,
            change.path,
            units.duration(change.self_before),
            units.duration(change.self_after),
            units.duration(change.waited_before),
            units.duration(change.waited_after),
            sign + units.duration(abs(change.change_ns)),
            *(moved if wide else ()),
        )
    return made


def _attribution(title: str, name: str, peak: TierPeak, rows: Sequence[MemoryRow], *, unaccounted: bool) -> Table:
    made = table(title, (name,), ("bytes", "share"))
    whole = max(peak.nbytes, 1)
    for row in rows:
        shown = row.name.lower() if unaccounted else row.name
        add(made, shown, units.size(row.nbytes), share(row.nbytes / whole))
    if unaccounted:
        add(made, "unaccounted", units.size(peak.unaccounted_nbytes), share(peak.unaccounted_nbytes / whole))
        if peak.fragmentation_nbytes is not None:
            made.add_section()
            kept = share(peak.fragmentation_nbytes / whole)
            add(made, "not in use, kept by the allocator", units.size(peak.fragmentation_nbytes), kept)
        made.add_section()
        add(made, "all", units.size(peak.nbytes), share(1.0 if peak.nbytes else None))
    return made


def _rate(nbytes_per_s: float | None) -> str:
    return _UNKNOWN if nbytes_per_s is None else units.rate(nbytes_per_s)


def _title(name: str, shown: int, total: int) -> str:
    return f"{name} ({shown} of {total})" if shown < total else name
