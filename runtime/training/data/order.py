"""Orders drawn by seed: who is set aside for evaluation, and in which order an epoch goes."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ....memory.errors import UsageError

_SPLIT: Final = 0
_EPOCH: Final = 1


def epoch_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The numbers below `count` in the order of an epoch: a function of the seed and the epoch alone."""
    return _permutation(count, (seed, _EPOCH, epoch))


def split(count: int, *, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents to train on and documents to evaluate on, each in ascending order; together all below `count`.

    Where a fraction is asked for, both sides have at least one document.

    Raises:
        UsageError: the fraction is none, or there is one document only.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"eval_fraction={fraction} has no meaning: give 0 (none) or a share of the documents below 1")
    if fraction == 0:
        return np.arange(count, dtype=np.int64), np.zeros(0, np.int64)
    if count < 2:
        raise UsageError(
            f"eval_fraction={fraction} sets whole documents aside, and there is {count}: give more documents (rows), "
            "or eval_fraction=0"
        )
    aside = min(max(round(count * fraction), 1), count - 1)
    drawn = _permutation(count, (seed, _SPLIT))
    return np.sort(drawn[aside:]), np.sort(drawn[:aside])


def _permutation(count: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """Sorted by random words. numpy promises that a bit generator's words stay the same from version to version, which
    it does not of `Generator.permutation`; a run may be resumed with another numpy."""
    if key[0] < 0:
        raise UsageError(f"seed={key[0]} has no meaning: give 0 or more")
    words = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)
