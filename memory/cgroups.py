"""Memory limits that control groups (version 1, version 2, or both mounted at once) put on this process.

A container or a batch system confines a process to a *path* of nested groups, and every group on that path may have a
limit of its own. What counts is the tightest one, and how much of it others on the same path have used already.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from .mounts import Mount, read_mounts

logger = logging.getLogger(__name__)

_UNLIMITED_FROM: Final = 2**62
"""Version 1 writes "no limit" as the largest multiple of the page size below 2^63; no real limit comes near it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CgroupLimit:
    """One limit on the path from this process's group to the root."""

    source: str
    """The file that states the limit."""
    limit_nbytes: int
    usage_nbytes: int
    """Bytes charged to the group: anonymous memory and page cache of everything in it."""
    reclaimable_nbytes: int
    """Page cache in `usage_nbytes` that the kernel drops before it refuses an allocation (the inactive file list)."""
    active_nbytes: int = 0
    """Page cache in `usage_nbytes` that was used more than once. The kernel drops it too, after the other."""

    @property
    def available_nbytes(self) -> int:
        """Bytes that can still be allocated under this limit."""
        return max(0, self.limit_nbytes - self.usage_nbytes + min(self.reclaimable_nbytes, self.usage_nbytes))

    @property
    def obtainable_nbytes(self) -> int:
        """The same with all page cache dropped: more than this, the kernel refuses."""
        cached = min(self.reclaimable_nbytes + self.active_nbytes, self.usage_nbytes)
        return max(0, self.limit_nbytes - self.usage_nbytes + cached)


def read_cgroup_limits(proc_root: Path = Path("/proc")) -> tuple[CgroupLimit, ...]:
    """Every memory limit that binds this process, from its own group outwards. Empty where there is none.

    Groups that cannot be seen from here (the path in `/proc/self/cgroup` is outside of what is mounted) are taken from
    the mount point inwards: that is the group of the container.
    """
    try:
        memberships = (proc_root / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return ()  # no control groups in this kernel
    mounts = read_mounts(proc_root)
    limits: list[CgroupLimit] = []
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = next((m for m in mounts if m.filesystem == "cgroup2"), None)
            if mount is not None:
                limits.extend(_limits_v2(mount, path))
        elif "memory" in controllers.split(","):
            mount = next((m for m in mounts if m.filesystem == "cgroup" and "memory" in m.options), None)
            if mount is not None:
                limits.extend(_limits_v1(mount, path))
    return tuple(limits)


def path_to_root(mount: Mount, path: str) -> Iterator[Path]:
    """The visible folders from the group at `path` (as /proc/self/cgroup names it) up to the mount point."""
    top = Path(mount.mount_point)
    try:
        parts = PurePosixPath(path).relative_to(mount.root).parts
    except ValueError:
        parts = ()
    # ".." stands for a group above the root of our namespace, which no mount of ours shows.
    folder = top if ".." in parts else top.joinpath(*parts)
    if not folder.is_dir():
        folder = top
    yield folder
    while folder != top:
        folder = folder.parent
        yield folder


def _limits_v2(mount: Mount, path: str) -> Iterator[CgroupLimit]:
    for folder in path_to_root(mount, path):
        usage = _read_number(folder / "memory.current")
        if usage is None:
            continue  # the root group, or one without the memory controller
        stat = _read_stat(folder / "memory.stat")
        # Above memory.high a process is throttled until it makes no progress: for us that is a limit like max.
        for name in ("memory.max", "memory.high"):
            limit = _read_number(folder / name)
            if limit is not None:
                yield CgroupLimit(
                    source=str(folder / name),
                    limit_nbytes=limit,
                    usage_nbytes=usage,
                    reclaimable_nbytes=stat.get("inactive_file", 0),
                    active_nbytes=stat.get("active_file", 0),
                )


def _limits_v1(mount: Mount, path: str) -> Iterator[CgroupLimit]:
    outermost: CgroupLimit | None = None
    seen: list[int] = []
    for depth, folder in enumerate(path_to_root(mount, path)):
        # A group that is not hierarchical does not account for the groups below it, only for its own processes.
        if depth > 0 and _read_number(folder / "memory.use_hierarchy") == 0:
            break
        usage = _read_number(folder / "memory.usage_in_bytes")
        if usage is None:
            continue
        stat = _read_stat(folder / "memory.stat")
        reclaimable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        active = stat.get("total_active_file", stat.get("active_file", 0))
        limit = _read_number(folder / "memory.limit_in_bytes")
        if limit is not None:
            seen.append(limit)
            yield CgroupLimit(
                source=str(folder / "memory.limit_in_bytes"),
                limit_nbytes=limit,
                usage_nbytes=usage,
                reclaimable_nbytes=reclaimable,
                active_nbytes=active,
            )
        inherited = stat.get("hierarchical_memory_limit", _UNLIMITED_FROM)
        if inherited < _UNLIMITED_FROM:
            outermost = CgroupLimit(
                source=f"{folder / 'memory.stat'} (hierarchical_memory_limit)",
                limit_nbytes=inherited,
                usage_nbytes=usage,
                reclaimable_nbytes=reclaimable,
                active_nbytes=active,
            )
    # The kernel also tells of a tighter limit in a group above the mount point, which we cannot see. Its usage stays
    # unknown; ours is a lower bound.
    if outermost is not None and outermost.limit_nbytes < min(seen, default=_UNLIMITED_FROM):
        yield outermost


def _read_number(path: Path) -> int | None:
    """The number in a control file; None where there is no such file, or it says that there is no limit."""
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("cannot read %s (%s): a memory limit there, if any, is not taken into account", path, error)
        return None
    if not text.isdecimal():
        return None  # "max"
    number = int(text)
    return None if number >= _UNLIMITED_FROM else number


def _read_stat(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}  # without it nothing counts as reclaimable: the careful side
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
