"""A memory cgroup with a hard cap around one child process, on either version of the kernel's interface.

    with MemoryCgroup(cap_nbytes=3 * 2**30) as group:
        process = group.popen([sys.executable, "-c", "..."])
        process.wait()
        usage = group.usage()

The cap covers everything the child is charged for: anonymous memory, the page cache it fills, kernel memory. It gets no
swap.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

REMOVE_TIMEOUT_S = 10.0


class CgroupUnavailableError(RuntimeError):
    """No memory cgroup can be made here. The message says what was tried and what to change."""


@dataclass(frozen=True, kw_only=True)
class CgroupUsage:
    """What a cgroup has seen since it was made."""

    peak_nbytes: int | None
    """Highest charge, page cache included; None where the kernel does not keep it (v2 before Linux 5.19)."""
    oom_kill_count: int
    """Processes that the kernel killed because the cap was reached."""
    swap_nbytes: int
    """Swap in use now: 0 unless the kernel could not be told to leave swap alone."""


@dataclass(frozen=True, kw_only=True)
class Interface:
    """File names of one version of the memory controller."""

    version: int
    limit: str
    peak: str
    oom_counts: str
    """A file of "name count" lines, one of them oom_kill."""


V1 = Interface(
    version=1, limit="memory.limit_in_bytes", peak="memory.max_usage_in_bytes", oom_counts="memory.oom_control"
)
V2 = Interface(version=2, limit="memory.max", peak="memory.peak", oom_counts="memory.events")


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A cgroup below which ours may be made."""

    folder: Path
    interface: Interface


class MemoryCgroup:
    """One cgroup, made on entry and removed, with whatever still runs in it, on exit."""

    def __init__(self, *, cap_nbytes: int) -> None:
        """`cap_nbytes` is the hard cap. Nothing is made before the context is entered."""
        self.cap_nbytes = cap_nbytes
        self._folder: Path | None = None
        self._interface = V2

    def __enter__(self) -> "MemoryCgroup":
        """Make the cgroup below the process's own one, or the nearest one above where that is possible.

        Raises CgroupUnavailableError where none is.
        """
        attempts = []
        for parent in candidate_parents():
            folder = parent.folder / f"penstock-bench-{os.getpid()}-{time.monotonic_ns()}"
            try:
                _make(folder, parent, self.cap_nbytes)
            except OSError as error:
                attempts.append(f"{parent.folder}: {error.strerror}")
                with contextlib.suppress(OSError):
                    folder.rmdir()
                continue
            self._folder, self._interface = folder, parent.interface
            return self
        tried = "; ".join(attempts) or "no memory controller is mounted, neither v1 nor v2"
        raise CgroupUnavailableError(
            f"cannot make a memory cgroup ({tried}). Run as root, or inside a delegated cgroup: "
            "systemd-run --user --scope -p Delegate=yes ..."
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        folder = self._made()
        if self._interface is V1:
            with contextlib.suppress(OSError):  # page cache left behind would be charged to the parent; not fatal
                (folder / "memory.force_empty").write_text("0")
        deadline_s = time.monotonic() + REMOVE_TIMEOUT_S
        while True:
            self._kill_members()
            try:
                folder.rmdir()
            except OSError:  # EBUSY until the last member is reaped
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.05)
            else:
                break
        self._folder = None

    def popen(self, command: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
        """Start `command` inside the cgroup: it enters before exec, so its first page is charged already."""
        members = os.fsencode(self._made() / "cgroup.procs")

        def enter() -> None:  # runs between fork and exec: system calls only
            descriptor = os.open(members, os.O_WRONLY)
            os.write(descriptor, b"0")
            os.close(descriptor)

        return subprocess.Popen(command, preexec_fn=enter, text=True, **options)

    def usage(self) -> CgroupUsage:
        """Peak, kills and swap so far; ask before the context is left."""
        folder = self._made()
        peak = folder / self._interface.peak
        swap = _counts(folder / "memory.stat").get("swap", 0) if self._interface is V1 else _number(folder, "swap")
        return CgroupUsage(
            peak_nbytes=int(peak.read_text()) if peak.exists() else None,
            oom_kill_count=_counts(folder / self._interface.oom_counts)["oom_kill"],
            swap_nbytes=swap,
        )

    def _made(self) -> Path:
        if self._folder is None:
            raise ValueError("this cgroup exists only inside its `with` block")
        return self._folder

    def _kill_members(self) -> None:
        for pid in (self._made() / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _number(folder: Path, what: str) -> int:
    file = folder / f"memory.{what}.current"
    return int(file.read_text()) if file.exists() else 0


def _counts(file: Path) -> dict[str, int]:
    return {name: int(count) for name, count in (line.split() for line in file.read_text().splitlines())}


def _make(folder: Path, parent: Parent, cap_nbytes: int) -> None:
    """Make and limit one cgroup; OSError when the kernel or the permissions say no."""
    if parent.interface is V2:
        control = parent.folder / "cgroup.subtree_control"
        if "memory" not in control.read_text().split():
            control.write_text("+memory")
    folder.mkdir()
    (folder / parent.interface.limit).write_text(str(cap_nbytes))
    if parent.interface is V2:
        swap_off = {"memory.swap.max": 0}
    else:  # memory + swap <= cap: what is swapped out makes no room
        swap_off = {"memory.swappiness": 0, "memory.memsw.limit_in_bytes": cap_nbytes}
    for name, value in swap_off.items():
        if (folder / name).exists():
            (folder / name).write_text(str(value))


def candidate_parents() -> Iterator[Parent]:
    """The process's own memory cgroup first, then those above it, up to the root of what is mounted.

    Below the own one comes first because whatever limits it must go on limiting us. Under v2 a cgroup that holds
    processes cannot have limited children, so there it is often one further up that works.
    """
    own = _own_paths()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, filesystem = line.partition(" - ")
        root, mount_point = fields.split()[3:5]
        kind, _, options = filesystem.split()
        mount = Path(mount_point)
        if kind == "cgroup" and "memory" in options.split(","):
            interface, path = V1, own.get("memory", "/")
        elif kind == "cgroup2" and "memory" in (mount / "cgroup.controllers").read_text().split():
            interface, path = V2, own.get("", "/")
        else:
            continue
        below = Path(path)
        relative = below.relative_to(root) if below.is_relative_to(root) else Path()
        for folder in (mount / relative, *(mount / relative).parents):
            if folder.is_relative_to(mount) and folder.is_dir():
                yield Parent(folder=folder, interface=interface)


def _own_paths() -> dict[str, str]:
    """Controller to the path of this process's cgroup; the key of the v2 hierarchy is the empty string."""
    paths = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    return paths
