"""How fast transfers of each size went: a cloud of points per link, and the link's measured peak."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ..runtime.profiler.profile import Profile
from ..runtime.profiler.schema import Link, Transfer
from .arrays import Arrays

_SIZES: Final = 240
_RATES: Final = 90


def bandwidth(profile: Profile, arrays: Arrays) -> list[dict[str, Any]]:
    """Of each link that moved anything: sizes (bytes) and rates (bytes per second), close points told as one."""
    found = profile[Transfer]
    whole = (found.nbytes > 0) & (found.end > found.start) & (found.failed == 0)
    clouds = []
    for link in Link:
        mine = found.where(whole & (found.link == link))
        if not len(mine):
            continue
        size = mine.nbytes.astype(np.float64)
        rate = size / (mine.end - mine.start) * 1e9
        columns = _cell(np.log(size), _SIZES) * (_RATES + 1) + _cell(rate, _RATES)
        _, place = np.unique(columns, return_inverse=True)
        place = place.reshape(-1)
        count = np.bincount(place)
        clouds.append(
            {
                "link": link.name,
                "size": arrays.add(np.bincount(place, weights=size) / count),
                "rate": arrays.add(np.bincount(place, weights=rate) / count),
                "count": arrays.add(count),
                "transfers": len(mine),
                "peak": profile.header.peaks.get(link.name),
            }
        )
    return clouds


def _cell(values: np.ndarray[Any, np.dtype[np.float64]], cells: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return np.zeros(len(values), dtype=np.int64)
    return ((values - low) / (high - low) * cells).astype(np.int64)
