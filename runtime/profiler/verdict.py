"""The one sentence that a report opens with."""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

from .bubble import CAUSES, DISK, HOST, LINK, OTHER, SPACE, Bubble
from .profile import Profile
from .schema import Link, Use
from .summary import Leak, Summary
from .waste import WASTEFUL, Waste

BUSY: Final = 0.9
"""From this share of computing on, nothing is worth changing for the sake of overlap."""
LOST: Final = 0.01
"""From this share of lost records on, the sentence says so."""
_FAST: Final = 0.7
"""A link that reaches this share of its peak is about as fast as can be hoped for."""
_NAMES: Final = 3
_BROUGHT: Final = {Link.DISK_READ: "read", Link.H2D: "copied to the device"}
_LAYERS: Final = re.compile(r"(.*\b(?:layers?|blocks?|h)\.)(\d+)")


def verdict(profile: Profile, summary: Summary, bubble: Bubble, waste: Waste) -> str:
    """What binds, where the idle time goes, what would help most; what makes the figures doubtful is said too.

    `summary` is complete but for its verdict; `bubble` and `waste` are those of its window.
    """
    finding, advice = _finding(profile, summary, bubble)
    wasted = _of_waste(profile, summary, waste)
    if wasted and _about_moving(summary):
        advice = ""  # more memory, slots or larger reads would serve what nobody needs
    parts = [part for part in (finding, wasted, advice) if part]
    if profile.header.emulated:
        parts[0] = "emulated: " + parts[0]
    parts += [_of_leak(leak) for leak in summary.leaks]
    lost = summary.dropped / max(summary.recorded + summary.dropped, 1)
    if lost >= LOST:
        parts.append(f"{_percent(lost)} of the records were lost: the figures cover only what was kept")
    return "; ".join(parts)


def _finding(profile: Profile, summary: Summary, bubble: Bubble) -> tuple[str, str]:
    """What binds and where the idle time goes; what would help most, "" where nothing can be said."""
    if summary.bubble is None:
        return "nothing was recorded", ""
    if not summary.compute_ns:
        if summary.links or summary.prefetch.uses:
            return "no computing was recorded, only blocks that moved: what the time went to cannot be said", ""
        return "no module computed and nothing moved while this was recorded", ""
    computing = 1 - summary.bubble
    if computing >= BUSY:
        return _busy(computing, summary)
    cause = _cause(summary)
    share = _percent(getattr(summary.idle, CAUSES[cause]) / summary.idle.total)
    if cause in (DISK, LINK, SPACE):
        return _moving(profile, summary, cause, share, _worst(profile, bubble.by_block(cause)))
    if cause == HOST:
        return (
            f"held up by the host: in {share} of idle time the next block was there and nothing was asked to compute",
            "less work between layers and steps (Python, sampling, tokenising) would help most",
        )
    assert cause == OTHER
    if len(profile[Use]):
        return (
            f"idle after the streamed model: {share} of idle time follows the last use of a block",
            "streaming is done",
        )
    return (
        f"idle between modules: {_percent(computing)} of the time computes and no block was waited for",
        "less work outside the modules (loading data, Python) would help most",
    )


def _cause(summary: Summary) -> int:
    """The one that most of the idle time is charged to."""
    charged = [getattr(summary.idle, name) for name in CAUSES]
    return max(range(len(CAUSES)), key=lambda row: charged[row])


def _about_moving(summary: Summary) -> bool:
    """Whether what would help is said of the blocks that move, and not of the program around them."""
    return (summary.bubble is not None and 1 - summary.bubble >= BUSY) or _cause(summary) in (DISK, LINK, SPACE)


def _busy(computing: float, summary: Summary) -> tuple[str, str]:
    text = f"compute-bound: {_percent(computing)} of the time computes"
    if not summary.links:
        return f"{text} and nothing moved", "only faster computing would help"
    if summary.binds != "compute":
        return f"{text}, and {_link_words(summary.binds)} at its measured rate takes as long", "nothing needs doing"
    return f"{text} and hides what moves", "nothing needs doing"


def _moving(profile: Profile, summary: Summary, cause: int, share: str, blocks: str) -> tuple[str, str]:
    of_blocks = f" of {blocks}" if blocks else ""
    if cause == SPACE:
        return (
            f"short of slots: in {share} of idle time the transfer{of_blocks} had not begun",
            "more memory to bring blocks into would help most",
        )
    bound, what, link, tier = (
        ("disk-bound", "reads", Link.DISK_READ, "host")
        if cause == DISK
        else ("link-bound", "copies to the device", Link.H2D, "device")
    )
    waits = f"{share} of idle time waits on {what}{of_blocks}"
    use = next((use for use in summary.links if use.link == link.name), None)
    if use is None or use.efficiency is None:
        return f"{bound}: {waits}", _more_memory(profile, tier)
    if use.efficiency < _FAST:
        return (
            f"{bound}: {waits}; {what} reach {_percent(use.efficiency)} of the measured peak",
            "larger ones or more at once would help most",
        )
    if summary.binds == "compute":
        return (
            f"late {what}: {waits}",
            "computing could hide them: more slots to bring blocks ahead would help most",
        )
    return f"{bound}: {waits}", _more_memory(profile, tier)


def _of_waste(profile: Profile, summary: Summary, waste: Waste) -> str:
    """How much was brought for nothing, why, and what to do; "" where it is little."""
    share = waste.share or 0.0
    if share <= WASTEFUL or not summary.prefetch.uses:  # without any use there was no call to bring blocks for
        return ""
    steps = max(summary.steps, 1)
    moved = " and ".join(f"{_size(nbytes / steps)} {_BROUGHT[link]}" for link, nbytes in waste.unused_nbytes.items())
    modules = _modules(profile, waste.by_block)
    found = (
        f"{_percent(share)} of what is brought is for nothing ({moved} {'per step' if summary.steps else 'in all'}"
        f"{f', for {modules}' if modules else ''})"
    )
    if not waste.strays:
        return (
            f"{found}, though in the predicted order: it made room for others, or was for calls that never came; "
            "recording more steps would tell which"
        )
    return f"{found}, as blocks come in another order than predicted; the same order in every call would help most"


def _more_memory(profile: Profile, tier: str) -> str:
    budget = profile.header.budgets.get(tier.upper())
    capacity = profile.header.capacities.get(tier.upper())
    if budget is not None and capacity is not None and budget < 0.75 * capacity:
        return f"more {tier} memory would help most (the budget is {_size(budget)} of {_size(capacity)})"
    return f"more {tier} memory would help most"


def _worst(profile: Profile, charged: dict[int, int]) -> str:
    """The blocks that most of this idle time waits for; how many they are, where none stand out."""
    known = [(block, ns) for block, ns in charged.items() if block in profile.blocks]
    return _standing_out([(_name(profile, block), ns) for block, ns in known], "blocks")


def _modules(profile: Profile, by_block: dict[int, int]) -> str:
    """The modules whose blocks these bytes are; a block that no one module leases stands for itself."""
    charged: Counter[str] = Counter()
    for block, nbytes in by_block.items():
        if block in profile.blocks:
            charged[profile.module_path(profile.blocks[block].module) or _name(profile, block)] += nbytes
    return _standing_out(list(charged.items()), "modules")


def _name(profile: Profile, block: int) -> str:
    row = profile.blocks[block]
    return row.name or profile.module_path(row.module) or f"block {block}"


def _standing_out(charged: list[tuple[str, int]], noun: str) -> str:
    """The names charged with most of it; how many there are, where none stand out; "" for none."""
    ranked = sorted(charged, key=lambda pair: -pair[1])
    worst = ranked[:_NAMES]
    standing_out = max(0.5, min(1.2 * _NAMES / max(len(ranked), 1), 0.95))
    if len(ranked) > _NAMES and sum(much for _, much in worst) < standing_out * sum(much for _, much in ranked):
        return f"{len(ranked)} {noun} alike"
    names = [name for name, _ in worst]
    layers = [match for match in map(_LAYERS.fullmatch, names) if match]
    if layers and len(layers) == len(names) and len({match[1] for match in layers}) == 1:
        return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, sorted(int(m[2]) for m in layers)))}"
    return ", ".join(names)


def _of_leak(leak: Leak) -> str:
    where = f", most of it in {leak.module}" if leak.module else ""
    return f"{leak.tier.lower()} memory grows by {_size(leak.nbytes_per_step)} each step{where}"


def _link_words(link: str) -> str:
    return {"H2D": "the link to the device", "D2H": "the link from the device"}.get(link, "the disk")


def _percent(share: float) -> str:
    """Whole; 100 % only for all of it."""
    return f"{100 if share >= 1 else min(round(share * 100), 99)} %"


def _size(nbytes: float) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{round(nbytes / factor, 1):g} {unit}"
    return f"{nbytes:.0f} bytes"
