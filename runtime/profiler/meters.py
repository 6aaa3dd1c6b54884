"""Meters of memory and energy of the host: the process, its control group, RAPL. What cannot be read has no meter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...memory.cgroups import read_cgroup_limits
from .heap import SHARE, Heap, HostMemory
from .pages import anonymous_nbytes
from .schema import Meter

Reader = Callable[[], int | None]
"""Reads a meter; None where there is nothing to tell this time."""


def cpu_energy(root: Path = Path("/sys/class/powercap")) -> Reader | None:
    """Microjoules of all packages, from the kernel's powercap files (their counters wrap; that is evened out)."""
    packages = []
    for folder in sorted(root.glob("intel-rapl:[0-9]*")):
        if folder.name.count(":") > 1:
            continue  # a part of a package
        try:
            packages.append(_Wrapping(folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())))
        except (OSError, ValueError):  # only root may read them since 2020 (CVE-2020-8694)
            return None
    return (lambda: sum(package.read() for package in packages)) if packages else None


class _Wrapping:
    """A counter that starts again at 0."""

    def __init__(self, path: Path, span: int) -> None:
        self._path, self._span = path, span
        self._last = int(path.read_text())
        self._base = 0

    def read(self) -> int:
        try:
            now = int(self._path.read_text())
        except (OSError, ValueError):
            return self._base + self._last
        if now < self._last:
            self._base += self._span
        self._last = now
        return self._base + now


def host_meters(level: str, known: Callable[[], int], looked: Callable[[int], None]) -> list[tuple[Meter, Reader]]:
    """Memory of this process and of its control group.

    `known` tells the bytes that have a name now; `looked` is told how many are free, whenever that was looked at.
    """
    memory = HostMemory(Heap.find(), share=SHARE[level], known=known, looked=looked)
    found: list[tuple[Meter, Reader]] = [
        (Meter.HOST_RSS, memory.resident),
        (Meter.HOST_FREED, memory.freed),  # of the reading before it
        (Meter.HOST_ANONYMOUS, anonymous_nbytes),
    ]
    usage = _cgroup_usage()
    if usage is not None:
        found.append((Meter.HOST_CGROUP, usage))
    return found


def _cgroup_usage() -> Callable[[], int] | None:
    """What the tightest control group around this process is charged with."""
    tightest = min(read_cgroup_limits(Path("/proc")), key=lambda limit: limit.limit_nbytes, default=None)
    if tightest is None:
        return None
    folder = Path(tightest.source).parent
    for name in ("memory.current", "memory.usage_in_bytes"):
        path = folder / name
        if path.is_file():
            return lambda: int(path.read_text())
    return None


def all_meters(level: str, known: Callable[[], int], looked: Callable[[int], None]) -> list[tuple[Meter, Reader]]:
    """What can be read of the host here. Meters of a device come when the program has begun to use one."""
    found = host_meters(level, known, looked)
    energy = cpu_energy()
    if energy is not None:
        found.append((Meter.ENERGY_CPU, energy))
    return found
