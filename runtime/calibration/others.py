"""How much of the processors others took while something was measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_BUSY: Final = (0, 1, 2, 5, 6)
"""Columns of /proc/stat: user, nice, system, interrupts, soft interrupts. Idle and waiting for disks are between."""
_STOLEN: Final = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticks:
    """Seconds of processor time up to some moment, on the cores that this process may use."""

    at_s: float
    busy_s: float
    """Of everybody."""
    own_s: float
    """Of this process."""
    stolen_s: float
    """That a hypervisor gave to other machines."""


def read_ticks(
    proc_root: Path = Path("/proc"),
    *,
    clock: Callable[[], float] = time.monotonic,
    own: Callable[[], float] = time.process_time,
) -> Ticks | None:
    """Now; None where the kernel does not tell."""
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    per_second = os.sysconf("SC_CLK_TCK")
    try:
        lines = [line.split() for line in (proc_root / "stat").read_text().splitlines()]
        rows = [[int(word) for word in words[1:]] for words in lines if words and words[0] in names]
    except (OSError, ValueError):
        return None
    if not rows or any(len(row) <= _STOLEN for row in rows):
        return None
    return Ticks(
        at_s=clock(),
        busy_s=sum(row[column] for row in rows for column in _BUSY) / per_second,
        own_s=own(),
        stolen_s=sum(row[_STOLEN] for row in rows) / per_second,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Others:
    """Cores that others took on average; a whole one is 1."""

    programs: float
    machines: float
    """Other virtual machines."""


def others_between(before: Ticks, after: Ticks) -> Others:
    """What was not ours between two moments."""
    taken = max(after.at_s - before.at_s, 1e-9)
    foreign = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return Others(programs=max(foreign / taken, 0.0), machines=max((after.stolen_s - before.stolen_s) / taken, 0.0))
