"""Arguments that several public functions take, and what they mean."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from .budget import parse_budget
from .memory.errors import UsageError
from .runtime.tiers import Wanted

Folders = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
MaxMemory = str | Mapping[str, int | str]


def wanted_of(max_memory: MaxMemory) -> Wanted:
    """Budgets as asked for.

    Raises:
        UsageError: a tier or a size has no meaning.
    """
    budget = parse_budget(max_memory)
    return Wanted(host=budget.host, device=budget.device, disk=budget.disk)


def folders_of(disk: Folders | None) -> list[str]:
    """Folders as asked for; an empty list is the default one.

    Raises:
        UsageError: the list is empty.
    """
    if disk is None:
        return []
    named = [disk] if isinstance(disk, str | os.PathLike) else list(disk)
    if not named:
        raise UsageError("disk is an empty list: name a folder, or leave it out for the default in the user's cache")
    return [os.fspath(folder) for folder in named]
