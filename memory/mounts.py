"""The mount table of this process, as /proc/self/mountinfo gives it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """One mounted filesystem."""

    root: str
    """The folder of the filesystem that is mounted ("/" unless it is a bind mount)."""
    mount_point: str
    filesystem: str
    """The type: "ext4", "tmpfs", "cgroup2", …"""
    options: frozenset[str]
    """Options of the filesystem itself (not of this mount); for version 1 control groups, the controllers."""


def read_mounts(proc_root: Path = Path("/proc")) -> tuple[Mount, ...]:
    """The mount table, in mounting order; empty where the system has none to read."""
    try:
        lines = (proc_root / "self" / "mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ()
    return tuple(_parse_line(line) for line in lines if " - " in line)


def find_mount(folder: Path, proc_root: Path = Path("/proc")) -> Mount | None:
    """The mount that holds `folder` (symlinks followed), or None where there is no mount table."""
    real = folder.resolve()
    holding = [mount for mount in read_mounts(proc_root) if real.is_relative_to(mount.mount_point)]
    # The longest mount point holds it; of several on the same point the last one covers the others.
    return max(enumerate(holding), key=lambda item: (len(item[1].mount_point), item[0]))[1] if holding else None


def _parse_line(line: str) -> Mount:
    # "36 35 98:0 /root /mount/point rw,noatime shared:1 … - ext4 /dev/sda rw,errors=continue"
    before, after = line.split(" - ", 1)
    fields, filesystem = before.split(" "), after.split(" ")
    return Mount(
        root=_unescape(fields[3]),
        mount_point=_unescape(fields[4]),
        filesystem=filesystem[0],
        options=frozenset(filesystem[2].split(",")) if len(filesystem) > 2 else frozenset(),
    )


def _unescape(field: str) -> str:
    """Undo the octal escapes (space, tab, newline, backslash) of the mount table."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
