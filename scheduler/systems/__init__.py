"""Other systems, as schedules on a machine in figures. One file each, and one line here."""

from __future__ import annotations

from ...memory.errors import UsageError
from .accelerate import Accelerate
from .flexgen import FlexGen
from .system import System
from .zero_inference import ZeroInference

_SYSTEMS: tuple[System, ...] = (
    Accelerate(),
    FlexGen(),
    ZeroInference(),
)


def systems() -> dict[str, System]:
    """All that are known, by name."""
    return {system.name: system for system in _SYSTEMS}


def system(name: str) -> System:
    """One of them.

    Raises:
        UsageError: there is none of that name.
    """
    known = systems()
    if name not in known:
        raise UsageError(f"--system {name!r} is not known: use {', '.join(known)}")
    return known[name]
