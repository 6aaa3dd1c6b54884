"""What was brought and never used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from .intervals import Ints, Mask
from .profile import Columns, Profile
from .schema import NONE, Cause, Link, Mark, MarkKind, Transfer, Use
from .window import Window

LINKS: Final = (Link.DISK_READ, Link.H2D)
"""Those that bring."""
WASTEFUL: Final = 0.2
"""Above this share of bytes brought for nothing, that is what to see to first."""


@dataclass(frozen=True, kw_only=True)
class Waste:
    """Bytes that were brought in a window for no use.

    A transfer was used where its block was used between its start and the next start of the same block on the same
    link. Rows of tables are not counted: only a lookup that wants them brings them.
    """

    brought_nbytes: int
    unused_nbytes: dict[Link, int]
    """By link; those that wasted anything."""
    by_block: dict[int, int]
    """Unused bytes by row of the block table, on all links; those that have any."""
    strays: int
    """Uses of blocks that were not the predicted ones."""

    @property
    def share(self) -> float | None:
        """Unused / brought; None where nothing was brought."""
        return sum(self.unused_nbytes.values()) / self.brought_nbytes if self.brought_nbytes else None

    @staticmethod
    def of(profile: Profile, window: Window) -> Waste:
        """That of the transfers that start in the window."""
        every = profile[Transfer]
        every = every.where((every.failed == 0) & (every.cause != Cause.ROWS) & (every.block != NONE))
        uses = profile[Use]
        met = np.maximum(uses.at, uses.ready)
        brought = 0
        by_link: dict[Link, int] = {}
        by_block: dict[int, int] = {}
        for link in LINKS:
            transfers = every.where(every.link == link)
            inside = window.holds(transfers.start)
            brought += int(transfers.nbytes[inside].sum())
            unused = transfers.where(inside & ~_used(transfers, uses.block, met))
            if len(unused):
                by_link[link] = int(unused.nbytes.sum())
            for block, nbytes in zip(unused.block.tolist(), unused.nbytes.tolist(), strict=True):
                by_block[block] = by_block.get(block, 0) + nbytes
        marks = profile[Mark]
        stray = ((marks.kind == MarkKind.MISMATCH) | (marks.kind == MarkKind.DEMAND)) & window.holds(marks.at)
        return Waste(brought_nbytes=brought, unused_nbytes=by_link, by_block=by_block, strays=int(stray.sum()))


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
