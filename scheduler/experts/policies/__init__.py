"""Policies of expert caches: one file each, and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ....memory.errors import UsageError
from ..shape import Routing
from .class_lru import ClassLru
from .decayed_lfu import DecayedLfu
from .lfu import Lfu
from .lru import Lru
from .mrs import Mrs
from .policy import Policy
from .static import Static

POLICIES: Final[dict[str, Callable[[Routing], Policy]]] = {
    policy.name: policy for policy in (Lru, Lfu, DecayedLfu, ClassLru, Mrs, Static)
}
"""Those that need no future. The oracle does, and is made where the future is known."""

DEFAULT: Final = Mrs.name
"""The best on average over the sweep of docs/moe.md; without scores it ranks by uses."""


def policy(name: str, routing: Routing) -> Policy:
    """A policy that has seen nothing yet.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in POLICIES:
        raise UsageError(f"policy {name!r} is not known: use {', '.join(POLICIES)}")
    return POLICIES[name](routing)
