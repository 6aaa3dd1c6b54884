"""The optimizers that there are. One file each, and one line here."""

from __future__ import annotations

from typing import Any

from .adamw import ADAMW
from .lion import LION
from .optimizer import Optimizer
from .sgd import SGD

_OPTIMIZERS: tuple[Optimizer[Any], ...] = (ADAMW, SGD, LION)


def optimizers() -> dict[str, Optimizer[Any]]:
    """All of them, by name."""
    return {optimizer.name: optimizer for optimizer in _OPTIMIZERS}


def optimizer(name: str) -> Optimizer[Any]:
    """One of them.

    Raises:
        ValueError: there is none of that name.
    """
    known = optimizers()
    if name not in known:
        raise ValueError(f"optimizer {name!r} is not known: use {', '.join(known)}")
    return known[name]
