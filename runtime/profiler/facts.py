"""What the header of a recording says about the run and the machine."""

from __future__ import annotations

import os
import platform
import secrets
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from ...memory.capacity import disk_capacity, host_capacity
from .schema import Header


def header(level: str, *, peaks: dict[str, float] | None = None) -> Header:
    """The header of a recording that begins now."""
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
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        machine["gpu"] = torch.cuda.get_device_name(index)
        capacities["DEVICE"] = torch.cuda.get_device_properties(index).total_memory
        versions["cuda"] = str(torch.version.cuda)
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
