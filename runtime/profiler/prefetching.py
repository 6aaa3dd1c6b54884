"""Whether blocks were there before they were needed, and what being early cost."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .intervals import Ints, Mask
from .profile import Columns, Profile
from .schema import NONE, Cause, Link, Transfer, Use, Wait
from .summary import PrefetchUse
from .window import Window


def prefetch_use(profile: Profile, window: Window) -> PrefetchUse:
    """How the uses of blocks inside the window were prepared."""
    every = profile[Use]
    fresh = _brought(every)
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
        wasted=_wasted(profile, window),
        median_lead_ns=round(float(np.median(leads))) if len(leads) else None,
        early_byte_seconds=float((_nbytes(profile, early.block) * (early.at - early.ready)).sum()) / 1e9,
        waited_ns=int(window.inside(waits.needed, waits.ready).sum()),
    )


def _share(mask: Mask) -> float | None:
    return float(mask.mean()) if len(mask) else None


def _brought(uses: Columns) -> Mask:
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


def _wasted(profile: Profile, window: Window) -> float | None:
    """Bytes that were brought and never used, as a share of the bytes brought.

    A transfer was used where its block was used between its start and the next start of the same block on the same
    link. Rows of tables are not counted: only a lookup that wants them brings them.
    """
    every = profile[Transfer]
    every = every.where((every.failed == 0) & (every.cause != Cause.ROWS) & (every.block != NONE))
    uses = profile[Use]
    met = np.maximum(uses.at, uses.ready)
    brought = unused = 0
    for link in (Link.DISK_READ, Link.H2D):
        transfers = every.where(every.link == link)
        inside = window.holds(transfers.start)
        brought += int(transfers.nbytes[inside].sum())
        unused += int(transfers.nbytes[inside & ~_used(transfers, uses.block, met)].sum())
    return unused / brought if brought else None


def _used(transfers: Columns, block: Ints, met: Ints) -> Mask:
    """Which transfers of one link brought what a use, of this block and met at this instant, was of."""
    # Uses and starts in one order: by block, by time, a start before a use of the same instant.
    blocks = np.concatenate((transfers.block, block))
    times = np.concatenate((transfers.start, met))
    of_use = np.concatenate((np.zeros(len(transfers), dtype=np.int8), np.ones(len(block), dtype=np.int8)))
    order = np.lexsort((of_use, times, blocks))
    blocks, is_use = blocks[order], of_use[order] > 0
    # What follows a start decides: a use of the same block, before its next start.
    used = np.zeros(len(order), dtype=bool)
    used[:-1] = ~is_use[:-1] & is_use[1:] & (blocks[1:] == blocks[:-1])
    result = np.zeros(len(order), dtype=bool)
    result[order] = used
    return result[: len(transfers)]
