"""Experts in a profile: whether they were there when their layer asked, and what came of bringing them ahead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import numpy as np

from .prefetching import brought
from .profile import Columns, Profile
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
    moves = moves.where(moves.link == link)
    ahead = moves.where(moves.cause == Cause.PREFETCH)
    guessed, seen = set(_keys(ahead)), set(_keys(moves))
    came = [
        (key, at >= ready)
        for key, at, ready in _timed(uses.where(inside & fresh))
        if key in seen  # what was brought before the recording is there
    ]
    in_time = sum(early for key, early in came if key in guessed)
    late = sum(not early for key, early in came if key in guessed)
    every = uses.where(ours & fresh)
    used = set(_keys(every))
    decided = ahead.where(window.holds(ahead.issued))
    total = int(inside.sum())
    return ExpertUse(
        uses=total,
        hits=total - len(came),
        missed=len(came) - in_time - late,
        ahead_in_time=in_time,
        ahead_late=late,
        ahead_for_nothing=sum(key not in used for key in _keys(decided)),
    )


def _keys(records: Columns) -> list[tuple[int, int]]:
    """Block, and when it was decided to bring it: one for each time that it is brought."""
    return [*zip(records.block.tolist(), records.issued.tolist(), strict=True)]


def _timed(uses: Columns) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Key of each use, when it was, and since when the block was there."""
    return zip(_keys(uses), uses.at.tolist(), uses.ready.tolist(), strict=True)
