"""Experts in a profile: whether they were there when their layer asked, and what came of bringing them ahead."""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from .prefetching import brought
from .profile import Profile
from .schema import Cause, Link, Transfer, Use
from .summary import ExpertUse
from .window import Window

_NAME: Final = re.compile(r".*\[\d+\]")
"""Of a block that is a part of an expert: the parameter, and its row. Pieces of tables have two numbers there."""


def expert_use(profile: Profile, window: Window) -> ExpertUse | None:
    """How the experts that layers asked for inside the window were prepared; None where none is a block of its own."""
    numbers = [number for number, block in profile.blocks.items() if _NAME.fullmatch(block.name)]
    if not numbers:
        return None
    uses, moves = profile[Use], profile[Transfer]
    fresh = brought(uses)
    ours = np.isin(uses.block, numbers)
    inside = ours & window.holds(uses.at)
    moves = moves.where(np.isin(moves.block, numbers))
    link = Link.H2D if (moves.link == Link.H2D).any() else Link.DISK_READ  # the last one before the expert is computed
    ahead = moves.where((moves.link == link) & (moves.cause == Cause.PREFETCH))
    guessed = {*zip(ahead.block.tolist(), ahead.issued.tolist(), strict=True)}
    came = uses.where(inside & fresh)
    keys = [*zip(came.block.tolist(), came.issued.tolist(), strict=True)]
    early = [at >= ready for at, ready in zip(came.at.tolist(), came.ready.tolist(), strict=True)]
    in_time = sum(is_early and key in guessed for key, is_early in zip(keys, early, strict=True))
    late = sum(not is_early and key in guessed for key, is_early in zip(keys, early, strict=True))
    every = uses.where(ours & fresh)
    used = {*zip(every.block.tolist(), every.issued.tolist(), strict=True)}
    decided = ahead.where(window.holds(ahead.issued))
    total = int(inside.sum())
    return ExpertUse(
        uses=total,
        hits=total - len(came),
        missed=len(came) - in_time - late,
        ahead_in_time=in_time,
        ahead_late=late,
        ahead_for_nothing=sum(
            key not in used for key in zip(decided.block.tolist(), decided.issued.tolist(), strict=True)
        ),
    )
