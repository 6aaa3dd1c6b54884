"""Whether blocks were there before they were needed, and what being early cost."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .intervals import Ints, Mask
from .profile import Columns, Profile
from .schema import NONE, Use, Wait
from .summary import PrefetchUse
from .waste import Waste
from .window import Window


def prefetch_use(profile: Profile, window: Window, waste: Waste) -> PrefetchUse:
    """How the uses of blocks inside the window were prepared; `waste` is that of the window."""
    every = profile[Use]
    fresh = brought(every)
    inside = window.holds(every.at)
    uses, streamed = every.where(inside), every.where(inside & fresh)
    leads = streamed.at - streamed.issued
    early = streamed.where((streamed.ready >= 0) & (streamed.ready < streamed.at))
    waits = profile[Wait]
    return PrefetchUse(
        uses=len(uses),
        on_time=_share(uses.ready <= uses.at),
        streamed_uses=len(streamed),
        streamed_on_time=_share(streamed.ready <= streamed.at),
        wasted=waste.share,
        median_lead_ns=round(float(np.median(leads))) if len(leads) else None,
        early_byte_seconds=float((_nbytes(profile, early.block) * (early.at - early.ready)).sum()) / 1e9,
        waited_ns=int(window.inside(waits.needed, waits.ready).sum()),
    )


def _share(mask: Mask) -> float | None:
    return float(mask.mean()) if len(mask) else None


def brought(uses: Columns) -> Mask:
    """Which uses a block was brought for: the first one after each time it was brought.

    A block that then stays keeps the instant at which it was decided on: later uses of it are not the prefetcher's.
    """
    order = np.lexsort((uses.at, uses.issued, uses.block))
    block, issued = uses.block[order], uses.issued[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (block[1:] != block[:-1]) | (issued[1:] != issued[:-1])
    result = np.zeros(len(order), dtype=bool)
    result[order] = first & (issued != NONE)
    return result


def _nbytes(profile: Profile, blocks: Ints) -> npt.NDArray[np.float64]:
    """The size of each block by the table; 0 where it is not known."""
    numbers, row = np.unique(blocks, return_inverse=True)
    sizes = [profile.blocks[n].nbytes if n in profile.blocks else 0 for n in numbers.tolist()]
    return np.array(sizes, dtype=np.float64)[row]
