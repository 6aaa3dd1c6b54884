"""penstock: the runtime for models that are larger than the machine.

    model = penstock.load("checkpoint/", max_memory={"host": "8GiB"})
    model.generate(**inputs)
"""

from .api import close, explain, load, offload
from .memory.errors import (
    CheckpointError,
    ClosedError,
    DiskError,
    DoesNotFitError,
    ForkError,
    PenstockError,
    ReadOnlyWeightError,
    ScratchBusyError,
    StallError,
    UsageError,
)

__all__ = [
    "CheckpointError",
    "ClosedError",
    "DiskError",
    "DoesNotFitError",
    "ForkError",
    "PenstockError",
    "ReadOnlyWeightError",
    "ScratchBusyError",
    "StallError",
    "UsageError",
    "close",
    "explain",
    "load",
    "offload",
]
