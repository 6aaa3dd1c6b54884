"""Which drive a folder lies on: what it calls itself, where the kernel tells."""

from __future__ import annotations

import os
from pathlib import Path


def drive_model(device: int, sys_root: Path = Path("/sys")) -> str:
    """The model and the kernel's name of the drive with this `st_dev`, for example "Samsung SSD 990 PRO (nvme0n1)".

    "" where the kernel does not tell: network and overlay filesystems, btrfs, and containers without /sys. A mapped
    volume (LVM, encryption) is named by the first drive below it.
    """
    folder = sys_root / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}"
    try:
        found = _drive(folder.resolve(strict=True))
    except OSError:
        return ""
    try:
        model = " ".join((found / "device" / "model").read_text().split())
    except OSError:
        model = ""  # virtual drives have none
    return f"{model} ({found.name})" if model else found.name


def _drive(folder: Path) -> Path:
    """The whole drive: up from a partition, down from a mapped volume."""
    if (folder / "partition").exists():
        return folder.parent
    below = sorted((folder / "slaves").glob("*"))
    return _drive(below[0].resolve(strict=True)) if below else folder
