"""How much processor time control groups (version 1 or 2) leave to this process: what a container calls its CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .cgroups import path_to_root
from .mounts import read_mounts


def read_cpu_quota(proc_root: Path = Path("/proc")) -> float | None:
    """Seconds of processor time per second that this process and those of its groups may take; None for no limit.

    The tightest limit on the path from its own group outwards counts. Unlike a set of cores, such a limit stops all
    threads at once when it is used up, until the next period.
    """
    try:
        memberships = (proc_root / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None  # no control groups in this kernel
    return min(_quotas(memberships, proc_root), default=None)


def _quotas(memberships: list[str], proc_root: Path) -> Iterator[float]:
    mounts = read_mounts(proc_root)
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = next((m for m in mounts if m.filesystem == "cgroup2"), None)
        elif "cpu" in controllers.split(","):
            mount = next((m for m in mounts if m.filesystem == "cgroup" and "cpu" in m.options), None)
        else:
            continue
        if mount is None:
            continue
        for folder in path_to_root(mount, path):
            # Version 2 writes "quota period" or "max period" into one file, version 1 a number into each of two.
            words = _words(folder / "cpu.max") or [
                *_words(folder / "cpu.cfs_quota_us"),
                *_words(folder / "cpu.cfs_period_us"),
            ]
            if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]) > 0:
                yield int(words[0]) / int(words[1])


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []  # the root group, or one without the controller: no limit there
