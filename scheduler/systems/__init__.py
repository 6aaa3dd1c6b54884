"""Other systems, as schedules on a machine in figures. One file each, and one line here."""

from __future__ import annotations

from ...memory.errors import UsageError
from .accelerate import Accelerate
from .fiddler import Fiddler
from .flexgen import FlexGen
from .ktransformers import KTransformers
from .lohan import Lohan
from .moe_lightning import MoeLightning
from .sglang_zero import SglangZero
from .system import System
from .zero_inference import ZeroInference
from .zero_infinity import ZeroInfinity

_SYSTEMS: tuple[System, ...] = (
    Accelerate(),
    FlexGen(),
    ZeroInference(),
    SglangZero(),
    ZeroInfinity(),
    Lohan(),
    MoeLightning(),
    Fiddler(),
    KTransformers(),
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
