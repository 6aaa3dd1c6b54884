"""A run in figures: what reports, checks and comparisons show."""

from __future__ import annotations

import msgspec
import numpy as np

from .bubble import Bubble, computing
from .energy import energy
from .expertuse import expert_use
from .leaks import leaks
from .links import Bound, link_uses
from .modules import module_uses
from .occupancy import peaks
from .prefetching import prefetch_use
from .profile import Profile
from .schema import Compute, Launches
from .summary import Summary
from .tokens import tokens_made
from .verdict import verdict
from .waste import Waste
from .window import Window


def summarise(profile: Profile, *, window: tuple[int, int] | None = None) -> Summary:
    """All figures of a profile.

    `window` (nanoseconds of the monotonic clock, the end not included) is what they are about; without it, time is
    that of the steady steps, and peaks of memory are those of the whole run. Raises UsageError for a window that runs
    backwards.
    """
    whole = Window.whole(profile)
    chosen = Window.of(profile, window)
    busy = computing(profile)
    compute_ns = busy.clip(chosen.start, chosen.end).length
    bubble = Bubble.of(profile, chosen.start, chosen.end, busy=busy)
    idle = bubble.idle(chosen.start, chosen.end)
    kernels = profile[Launches]
    kernels = kernels.where(chosen.holds(kernels.start))
    assert idle.total == chosen.length - compute_ns, (idle, chosen, compute_ns)
    links = link_uses(profile, chosen, busy)
    bound = Bound.of(compute_ns, links)
    waste = Waste.of(profile, chosen)
    steps = chosen.steps(profile)
    tokens = int(tokens_made(steps, profile.string).sum())
    memory_window = whole if window is None else chosen
    summary = Summary(
        window_ns=(chosen.start, chosen.end),
        steps=len(steps),
        step_ns=round(float(np.median(steps.end - steps.start))) if len(steps) else None,
        tokens=tokens,
        tokens_per_s=tokens / chosen.length * 1e9 if tokens and chosen.length else None,
        compute_ns=compute_ns,
        bubble=idle.total / chosen.length if chosen.length else None,
        idle=idle,
        links=links,
        bound_ns=bound.ns,
        distance=chosen.length / bound.ns if bound.ns else None,
        binds=bound.binds,
        prefetch=prefetch_use(profile, chosen, waste),
        experts=expert_use(profile, chosen),
        peaks=peaks(profile, memory_window),
        leaks=leaks(profile, chosen),
        modules=module_uses(profile, chosen, memory_window),
        energy=energy(profile, chosen, tokens),
        recorded=profile.footer.recorded,
        dropped=profile.footer.dropped,
        overhead=profile.footer.own_ns / whole.length if whole.length else None,
        tklqt_ns=int(kernels.queued.sum()) if len(kernels) else None,
        tklqt_steps=int(kernels.steps.sum()),
        tklqt_launches=int(kernels.launches.sum()),
        behind_ns=_behind(profile, chosen),
        verdict="",
    )
    return msgspec.structs.replace(summary, verdict=verdict(profile, summary, bubble, waste))


def _behind(profile: Profile, window: Window) -> int | None:
    """How far the device ran behind the host where modules began, in the middle; None where none knows it."""
    spans = profile[Compute]
    spans = spans.where((spans.launched >= 0) & window.holds(spans.start))
    # Clocks of host and device agree to some microseconds: a start before its launch queued for no time.
    return round(float(np.median(np.maximum(spans.start - spans.launched, 0)))) if len(spans) else None
