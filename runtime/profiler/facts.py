"""What the header of a recording says about the run and the machine.

What there is to know of a GPU comes later, when the program has begun to use one: `with_device`. Every segment of a
file repeats the header, and readers take the newest.
"""

from __future__ import annotations

import os
import platform
import secrets
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import msgspec
import psutil
import torch

from ...memory.capacity import disk_capacity, host_capacity
from .schema import Header

_cuda: Final[Any] = torch.cuda


def header(level: str, *, peaks: dict[str, float] | None = None) -> Header:
    """The header of a recording that begins now. Asks CUDA nothing: that would initialise it (see `device`)."""
    capacity = host_capacity()
    capacities = {"HOST": capacity.limit_nbytes or capacity.total_nbytes}
    machine = {
        "host": platform.node(),
        "kernel": platform.release(),
        "cpu": platform.processor() or platform.machine(),
        "cores": str(psutil.cpu_count(logical=True) or 0),
        "memory": str(capacity.total_nbytes),
        "filesystem": disk_capacity(".").filesystem,
    }
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("penstock", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return Header(
        run=secrets.token_hex(8),
        level=level,
        began_ns=time.monotonic_ns(),
        began_unix_s=time.time(),
        argv=tuple(sys.argv),
        versions=versions,
        machine=machine,
        capacities=capacities,
        budgets={},
        peaks=peaks or {},
        pid=os.getpid(),
    )


def with_device(header: Header, index: int) -> Header:
    """A header that knows the CUDA device with this number, which the program has used.

    Raises:
        RuntimeError: the device does not answer.
    """
    properties = _cuda.get_device_properties(index)
    machine = {**header.machine, "gpu": f"{properties.name} (cuda:{index})"}
    uuid = getattr(properties, "uuid", None)
    if uuid is not None:
        machine["gpu uuid"] = str(uuid)
    return msgspec.structs.replace(
        header,
        machine=machine,
        capacities={**header.capacities, "DEVICE": int(properties.total_memory)},
        versions={**header.versions, "cuda": str(torch.version.cuda or torch.version.hip)},
    )
