"""Everything that a page knows of one run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from ..runtime.profiler.profile import Profile
from ..runtime.profiler.schema import Transfer
from ..runtime.profiler.summary import Idle, ModuleUse, Summary, TierPeak
from .arrays import Arrays
from .bands import bands
from .bandwidth import bandwidth
from .bubbles import bubbles
from .clock import Clock
from .focus import focuses
from .lanes import lanes
from .leads import leads
from .names import Names
from .residency import residency

_MOST_MODULES: Final = 3000
_MOST_INSTANTS: Final = 6000


def run(
    profile: Profile, summary: Summary, arrays: Arrays, *, idle_steps: Sequence[tuple[int, Idle]], most: int
) -> dict[str, Any]:
    """The document of a run, with its arrays in `arrays`; about `most` spans per kind of record."""
    clock = Clock.of(profile)
    names = Names.of(profile)
    focus = focuses(profile, summary, clock)
    exact = [(one.low, one.high) for one in focus]
    return {
        "clock": clock.describe(),
        "names": names.document,
        "focus": [[one.label, one.low, one.high] for one in focus],
        "about": _about(profile),
        "notes": _notes(profile, summary),
        "summary": _figures(summary),
        "modules": _modules(profile, summary, names),
        "modules_left_out": max(0, len(summary.modules) - _MOST_MODULES),
        "transfers": len(profile[Transfer]),
        "bands": bands(profile, clock, arrays, most=_MOST_INSTANTS),
        "lanes": lanes(profile, clock, names, arrays, most=most, exact=exact),
        "bubbles": bubbles(profile, clock, arrays, idle_steps),
        "residency": residency(profile, clock, names, arrays, most=most, exact=exact),
        "bandwidth": bandwidth(profile, arrays),
        "leads": leads(profile),
        "peaks": [_peak(peak, clock) for peak in summary.peaks],
    }


def _figures(summary: Summary) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(summary)
    for name in ("modules", "peaks"):
        del found[name]
    found["window_length_ns"] = summary.window_ns[1] - summary.window_ns[0]
    return found


def _modules(profile: Profile, summary: Summary, names: Names) -> list[list[Any]]:
    """Rows of the table: page number of the module, path, class, times, bytes by link, bytes by category."""
    numbers = {profile.module_path(int(number)): place for place, number in enumerate(names.modules)}
    return [
        [
            numbers.get(use.path or "(root)", -1),
            use.path or "(root)",
            use.kind,
            use.calls,
            use.waited_ns,
            use.self_ns,
            use.total_ns,
            use.moved_nbytes,
            use.peak_nbytes,
        ]
        for use in summary.modules[:_MOST_MODULES]
        if _says_anything(use)
    ]


def _says_anything(use: ModuleUse) -> bool:
    return bool(use.calls or use.total_ns or use.waited_ns or use.moved_nbytes or use.peak_nbytes)


def _peak(peak: TierPeak, clock: Clock) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(peak)
    found["modules"] = [[row.name, row.nbytes] for row in peak.modules[:_MOST_MODULES]]
    found["categories"] = [[row.name, row.nbytes] for row in peak.categories]
    found["at"] = (peak.at_ns - clock.first_ns) // clock.tick_ns
    return found


def _about(profile: Profile) -> list[list[str]]:
    header = profile.header
    try:
        began = datetime.fromtimestamp(header.began_unix_s, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):  # a time that no calendar has
        began = str(header.began_unix_s)
    return [
        ["command", " ".join(header.argv)],
        ["began", began],
        ["level", header.level],
        *([["pid", str(header.pid)]] if header.pid >= 0 else []),
        *([name, value] for name, value in header.machine.items()),
        *([name, value] for name, value in header.versions.items()),
        ["run", header.run],
    ]


def _notes(profile: Profile, summary: Summary) -> list[str]:
    """What a reader must know before believing a figure."""
    footer = profile.footer
    notes = []
    if profile.header.emulated:
        notes.append("Emulated device: links are throttled copies, and no figure is one of a real device.")
    if summary.dropped:
        share = summary.dropped / max(1, summary.recorded)
        notes.append(f"{summary.dropped:,} of {summary.recorded:,} records ({share:.1%}) were lost: the ring was full.")
    if footer.failure:
        notes.append(f"The run ended with {footer.failure}")
    elif not footer.last:
        notes.append("The run did not end in order: the last second may be missing.")
    return [*notes, *profile.problems]
