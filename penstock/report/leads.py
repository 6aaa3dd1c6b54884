"""How early blocks were there: the distribution of ready − needed."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ..runtime.profiler.profile import Profile
from ..runtime.profiler.schema import Use

_BINS: Final = 90
_NICE: Final = (1, 2, 5, 10)
_OUTLIERS_PERCENT: Final = 0.5


def leads(profile: Profile) -> dict[str, Any] | None:
    """Counts of uses by ready − needed (ns), of blocks that were brought; None where none was.

    Bins are of one nice width with an edge at zero; the first and the last one hold everything beyond them.
    """
    uses = profile[Use]
    uses = uses.where(uses.issued >= 0)
    if not len(uses):
        return None
    lead = uses.ready - uses.at
    low, high = np.percentile(lead, (_OUTLIERS_PERCENT, 100 - _OUTLIERS_PERCENT))
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    width = _nice((high - low) / _BINS)
    first, last = int(np.floor(low / width)), max(1, int(np.ceil(high / width)))
    # A block that came exactly when it was needed (lead 0) was on time: bins are open on the left.
    place = np.clip(-((-lead) // width) - 1, first - 1, last)
    place = np.maximum(place, first)
    place = np.minimum(place, last - 1)
    counts = np.bincount(place - first, minlength=last - first)
    return {
        "width": width,
        "first": first,
        "counts": counts.tolist(),
        "least": int(lead.min()),
        "most": int(lead.max()),
        "median": int(np.median(lead)),
        "late": int((lead > 0).sum()),
        "uses": len(lead),
    }


def _nice(width: float) -> int:
    """The least of 1, 2 or 5 times a power of ten that is at least `width` (ns), and 1."""
    power = 1
    while power * 10 < width:
        power *= 10
    return next(power * times for times in _NICE if power * times >= width or times == _NICE[-1])
