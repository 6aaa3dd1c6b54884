"""How many tokens a run made. What a draft model guesses is none: the model that checks the guesses makes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .intervals import Ints
from .profile import Columns
from .schema import NONE

VERIFY = "verify"
"""The phase of a call that checks guesses."""


def tokens_made(steps: Columns, string: Callable[[int], str]) -> Ints:
    """The tokens of each of these steps; 0 where they are not known, and where they are a draft's guesses.

    A draft is a model that is followed by another one's check directly, once at least. `string` tells the names of
    phases.
    """
    order = np.argsort(steps.start, kind="stable")
    module = steps.module[order]
    verifies = np.array([string(number) == VERIFY for number in steps.phase[order].tolist()], dtype=bool)
    guessed = (module[:-1] != NONE) & (module[1:] != NONE) & (module[:-1] != module[1:]) & verifies[1:]
    drafts = np.setdiff1d(module[:-1][guessed], module[verifies])
    return np.where(np.isin(steps.module, drafts), 0, np.maximum(steps.tokens, 0))
