"""What a calibration depends on, as this machine tells it. Takes some milliseconds."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

from ...memory.capacity import host_capacity
from ...memory.cpuquota import read_cpu_quota
from ...memory.drives import drive_model
from ...memory.mounts import find_mount
from ...scheduler.calibration import DriveIdentity, Fingerprint, GpuIdentity


def fingerprint(
    device: torch.device, folders: Iterable[str], *, proc_root: Path = Path("/proc"), sys_root: Path = Path("/sys")
) -> Fingerprint:
    """This machine as it is now.

    Args:
        device: What computes; a GPU is named only where it is one.
        folders: On the drives to name. Those that do not exist are left out.
        proc_root: Where the kernel shows processes.
        sys_root: Where the kernel shows devices.
    """
    drives = (identify_drive(folder, proc_root, sys_root) for folder in folders)
    return Fingerprint(
        cpu=cpu_model(proc_root),
        cores=len(os.sched_getaffinity(0)),
        cpu_quota=read_cpu_quota(proc_root),
        memory_nbytes=host_capacity(proc_root).total_nbytes,
        kernel=platform.release(),
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
        gpus=(_gpu(device, proc_root),) if device.type == "cuda" else (),
        drives=tuple(drive for drive in drives if drive is not None),
    )


def cpu_model(proc_root: Path = Path("/proc")) -> str:
    """The CPU as it calls itself; its architecture where the kernel does not tell."""
    try:
        with open(proc_root / "cpuinfo") as file:  # read no further: it has a page for each of hundreds of cores
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "model name":
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def identify_drive(folder: str, proc_root: Path = Path("/proc"), sys_root: Path = Path("/sys")) -> DriveIdentity | None:
    """The drive that a folder lies on; None where there is no such folder."""
    try:
        device = os.stat(folder).st_dev
    except OSError:
        return None
    mount = find_mount(Path(folder), proc_root)
    return DriveIdentity(
        folder=folder,
        device=device,
        filesystem=mount.filesystem if mount else "unknown",
        model=drive_model(device, sys_root),
    )


def _gpu(device: torch.device, proc_root: Path) -> GpuIdentity:
    properties = torch.cuda.get_device_properties(device)
    return GpuIdentity(name=properties.name, driver=_driver(proc_root), uuid=str(getattr(properties, "uuid", "")))


def _driver(proc_root: Path) -> str:
    """The driver's version, from "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan …"."""
    try:
        words = (proc_root / "driver" / "nvidia" / "version").read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return ""
    return next((word for word in words if word[:1].isdigit() and "." in word), "")
