"""How much of each tier was taken, over time: memory records summed up, for counter tracks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..profile import Column, Profile
from ..schema import Category, Memory, Tier


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """Live bytes of one category in one tier."""

    tier: Tier
    category: Category
    at: Column
    nbytes: Column
    """From each instant of `at` on."""


def levels(profile: Profile) -> list[Level]:
    """Every tier and category that memory was recorded for. One value per instant: the last."""
    memory = profile[Memory]
    found = []
    for tier in Tier:
        for category in Category:
            part = memory.where((memory.tier == tier) & (memory.category == category))
            if not len(part):
                continue
            order = np.argsort(part.at, kind="stable")
            at, nbytes = part.at[order], np.cumsum(part.nbytes[order])
            last = np.append(at[1:] != at[:-1], True)
            found.append(Level(tier=tier, category=category, at=at[last], nbytes=nbytes[last]))
    return found
