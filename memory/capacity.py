"""What the machine can still give this process: RAM under all limits, free disk; and what the process has taken."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from .cgroups import read_cgroup_limits
from .errors import PenstockError
from .mounts import find_mount

_MEMORY_FILESYSTEMS: Final = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs", "rootfs"})


@dataclass(frozen=True, kw_only=True, slots=True)
class HostCapacity:
    """RAM of the machine, and how much of it this process can still allocate. Swap is never counted."""

    total_nbytes: int
    """RAM of the machine."""
    available_nbytes: int
    """What this process can still allocate: the least of MemAvailable and, for each control group around the process,
    limit - usage + reclaimable page cache."""
    available_source: str
    """What `available_nbytes` was limited by: "MemAvailable", or the file that states a control group's limit."""
    limit_nbytes: int | None
    """The smallest control group limit below `total_nbytes`; None where no group limits this process."""
    limit_source: str | None
    """The file that states `limit_nbytes`."""
    obtainable_nbytes: int
    """`available_nbytes` if the kernel drops all page cache of the control groups, also what was used more than once:
    an allocation beyond this fails for sure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskCapacity:
    """The filesystem that holds a folder."""

    folder: str
    """The folder, or its nearest parent that exists."""
    total_nbytes: int
    free_nbytes: int
    """Bytes that this user may still write."""
    filesystem: str
    """Its type ("ext4", "xfs", "tmpfs", …), or "unknown" where the system does not tell."""
    in_memory: bool
    """True where the files lie in RAM (tmpfs and its kin), which saves no memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessMemory:
    """Resident memory of this process by kind, in bytes."""

    anonymous_nbytes: int
    """Heap, stacks, private mappings (RssAnon)."""
    file_nbytes: int
    """Mapped files, which the kernel can drop (RssFile)."""
    shared_nbytes: int
    """Shared memory, tmpfs mappings (RssShmem)."""
    peak_resident_nbytes: int
    """The highest that the sum of the three has been (VmHWM)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessIO:
    """What this process has read and written since it started (/proc/self/io)."""

    read_nbytes: int
    """Bytes fetched from storage: page cache hits are not counted, O_DIRECT reads are."""
    write_nbytes: int
    """Bytes sent to storage, or dirtied in the page cache."""
    requested_read_nbytes: int
    """Bytes asked for by read calls, wherever they came from."""
    requested_write_nbytes: int
    """Bytes handed to write calls, wherever they went."""


def host_capacity(proc_root: Path = Path("/proc")) -> HostCapacity:
    """Read RAM and control group limits now. Other processes change the answer at any time."""
    total, available = _machine_memory(proc_root)
    limits = read_cgroup_limits(proc_root)
    room, source = min(((limit.available_nbytes, limit.source) for limit in limits), default=(available, ""))
    tightest = min(limits, key=lambda limit: limit.limit_nbytes, default=None)
    if tightest is not None and tightest.limit_nbytes >= total:
        tightest = None
    return HostCapacity(
        total_nbytes=total,
        available_nbytes=min(available, room),
        available_source=source if room < available else "MemAvailable",
        limit_nbytes=tightest.limit_nbytes if tightest else None,
        limit_source=tightest.source if tightest else None,
        obtainable_nbytes=min([available, *(limit.obtainable_nbytes for limit in limits)]),
    )


def disk_capacity(folder: str | os.PathLike[str], proc_root: Path = Path("/proc")) -> DiskCapacity:
    """Free space and type of the filesystem that `folder` is on, or would be on once made.

    Raises:
        OSError: the nearest existing parent cannot be examined.
    """
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    space = os.statvfs(existing)
    mount = find_mount(existing, proc_root)
    filesystem = mount.filesystem if mount else "unknown"
    return DiskCapacity(
        folder=str(existing),
        total_nbytes=space.f_blocks * space.f_frsize,
        free_nbytes=space.f_bavail * space.f_frsize,
        filesystem=filesystem,
        in_memory=filesystem in _MEMORY_FILESYSTEMS,
    )


def memlock_limit() -> int | None:
    """Bytes this process may lock (RLIMIT_MEMLOCK), None for no limit.

    For reports only, never a cap: memory registered with a GPU driver is pinned by the driver and not charged to it.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def process_memory(proc_root: Path = Path("/proc")) -> ProcessMemory:
    """What this process holds in RAM now.

    The kernel keeps these counters per thread and merges them late: they can be a few hundred KiB behind.

    Raises:
        PenstockError: the system does not tell (not Linux, or a sandbox that hides it).
    """
    fields = _read_fields(proc_root / "self" / "status", ("RssAnon", "RssFile", "RssShmem", "VmHWM"))
    return ProcessMemory(
        anonymous_nbytes=fields["RssAnon"] * 1024,
        file_nbytes=fields["RssFile"] * 1024,
        shared_nbytes=fields["RssShmem"] * 1024,
        peak_resident_nbytes=fields["VmHWM"] * 1024,
    )


def process_io(proc_root: Path = Path("/proc")) -> ProcessIO:
    """What this process has read and written so far.

    Raises:
        PenstockError: the system does not tell (not Linux, or a sandbox that hides it).
    """
    fields = _read_fields(proc_root / "self" / "io", ("read_bytes", "write_bytes", "rchar", "wchar"))
    return ProcessIO(
        read_nbytes=fields["read_bytes"],
        write_nbytes=fields["write_bytes"],
        requested_read_nbytes=fields["rchar"],
        requested_write_nbytes=fields["wchar"],
    )


def _machine_memory(proc_root: Path) -> tuple[int, int]:
    """(total, available) bytes of RAM."""
    try:
        fields = _read_fields(proc_root / "meminfo", ("MemTotal", "MemAvailable"))
    except PenstockError:
        memory = psutil.virtual_memory()  # not Linux
        return int(memory.total), int(memory.available)
    return fields["MemTotal"] * 1024, fields["MemAvailable"] * 1024


def _read_fields(path: Path, names: tuple[str, ...]) -> dict[str, int]:
    """The numbers behind `names` in a file of "name: number [kB]" lines, as they stand there."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise PenstockError(f"cannot read {path}: {error.strerror}. This needs Linux with /proc mounted.") from error
    wanted = {}
    for line in lines:
        name, _, rest = line.partition(":")
        if name in names:
            wanted[name] = int(rest.split()[0])
    missing = [name for name in names if name not in wanted]
    if missing:
        raise PenstockError(f"{path} does not tell {', '.join(missing)}. This needs Linux 4.5 or newer.")
    return wanted
