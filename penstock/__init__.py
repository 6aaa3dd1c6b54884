"""penstock: the runtime for models that are larger than the machine.

    model = penstock.load("checkpoint/", max_memory={"host": "8GiB"})
    model.generate(**inputs)

Names are imported when they are first used: torch takes seconds, and `penstock --help` needs none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .memory.errors import (
    CheckpointError,
    ClosedError,
    DiskError,
    DoesNotFitError,
    ForkError,
    PenstockError,
    ProfileError,
    ReadOnlyWeightError,
    ScratchBusyError,
    StallError,
    StoreError,
    UsageError,
)

if TYPE_CHECKING:
    from .api import close, explain, generate_many, load, offload, save_plan
    from .kvcache import TieredCache
    from .prefixes import PrefixStore
    from .runtime.profiler.profiler import Profiler
    from .runtime.training.early import NonFiniteGradientError
    from .runtime.training.optimizers import SGD, AdamW, Lion
    from .training import prepare, resume, save

_LAZY = {
    "SGD": "runtime.training.optimizers",
    "AdamW": "runtime.training.optimizers",
    "Lion": "runtime.training.optimizers",
    "NonFiniteGradientError": "runtime.training.early",
    "PrefixStore": "prefixes",
    "Profiler": "runtime.profiler.profiler",
    "TieredCache": "kvcache",
    "close": "api",
    "explain": "api",
    "generate_many": "api",
    "load": "api",
    "offload": "api",
    "prepare": "training",
    "resume": "training",
    "save": "training",
    "save_plan": "api",
}

__all__ = [
    "SGD",
    "AdamW",
    "CheckpointError",
    "ClosedError",
    "DiskError",
    "DoesNotFitError",
    "ForkError",
    "Lion",
    "NonFiniteGradientError",
    "PenstockError",
    "PrefixStore",
    "ProfileError",
    "Profiler",
    "ReadOnlyWeightError",
    "ScratchBusyError",
    "StallError",
    "StoreError",
    "TieredCache",
    "UsageError",
    "close",
    "explain",
    "generate_many",
    "load",
    "offload",
    "prepare",
    "resume",
    "save",
    "save_plan",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
