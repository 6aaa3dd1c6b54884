"""Seconds of a sweep over a layout, roughly: they rank drafts, and nothing else is made of them."""

from __future__ import annotations

from typing import Final

from ..scheduler.residency import Residency
from .layout import Budgets, Layout

DEPTH: Final = 96 * 2**20
"""Bytes of ring, besides the block in use, that keep a drive busy: 8 requests of 4 MiB under way, the rest ready."""
BLOCK_OVERHEAD_S: Final = 1e-4
SHALLOW_COST: Final = 0.15
"""What a sweep loses, at most, to a ring too short to keep the link busy; an estimate that only ranks drafts."""


def sweep_s(layout: Layout, budgets: Budgets) -> float:
    """What a token takes, where the layout was placed by that; else what is moved over its rate, and a little for each
    block that is."""
    if layout.token_s is not None:
        return layout.token_s
    streamed = sum(layout.per_token(block) for block in layout.streamed())
    disk = sum(layout.reads_per_token(b) * b.image.read_nbytes for b in layout.on_disk()) / budgets.disk_rate
    copied = sum(layout.per_token(b) * b.image.data_nbytes for b in layout.streamed()) if layout.back else 0
    link = copied / budgets.link_rate
    front, back = layout.front, layout.back
    if back is None or budgets.device is None:
        moved = disk * (1 + _shallowness(front, budgets.host // 8))
    else:
        moved = max(
            disk * (1 + _shallowness(back, budgets.host // 4)), link * (1 + _shallowness(front, budgets.device // 8))
        )
    return moved + streamed * BLOCK_OVERHEAD_S


def _shallowness(ring: Residency, affordable: int) -> float:
    """The part of its time that a link loses to a ring that is shorter than it would have to be to keep it busy."""
    wanted = min(DEPTH, affordable)
    ahead = (ring.slots - 1) * ring.slot_nbytes  # one is in use
    return SHALLOW_COST * max(0.0, 1 - ahead / wanted) if ring.slots and wanted > 0 else 0.0
