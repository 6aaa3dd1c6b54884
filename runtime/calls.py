"""Root calls under way: the outermost calls into a streamed model, and the calls of its modules inside of them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from ..scheduler.lease import Lease
from .sweep import Sweep


@dataclass(kw_only=True, slots=True, eq=False)
class Frame:
    """One call of a wrapped module."""

    leases: list[Lease] = field(default_factory=list)
    own: int = 0
    """How many of them the module itself asked for; the others are kept for views that it took."""


@dataclass(kw_only=True, slots=True, eq=False)
class RootCall:
    """One root call."""

    sweep: Sweep | None
    """The sweep that it is part of."""
    frames: list[Frame] = field(default_factory=list)
    contexts: list[AbstractContextManager[Any]] = field(default_factory=list)
    """What was entered for as long as it lasts."""
