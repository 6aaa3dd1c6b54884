"""speedscope's evented format: compute spans of each lane as a flamegraph over time."""

from __future__ import annotations

import json
from typing import Any, BinaryIO

import numpy as np

from ..profile import Profile
from ..schema import Compute, Phase
from .labels import enum_label, module_label
from .lanes import edges, nesting


def write_speedscope(profile: Profile, file: BinaryIO) -> None:
    """Write the compute spans as one speedscope profile per lane. Times are nanoseconds since the first record."""
    frames: dict[str, int] = {}
    origin = profile.span()[0]
    document = {
        "$schema": "https://www.speedscope.app/file-format-schema.json",
        "name": " ".join(profile.header.argv),
        "exporter": "penstock",
        "activeProfileIndex": 0,
        "profiles": _lanes(profile, frames, origin),
        "shared": {"frames": [{"name": name} for name in frames]},
    }
    file.write(json.dumps(document, separators=(",", ":")).encode())


def _lanes(profile: Profile, frames: dict[str, int], origin: int) -> list[dict[str, Any]]:
    compute = profile[Compute]
    found = []
    for lane in np.unique(compute.lane).tolist():
        part = compute.where(compute.lane == lane)
        names = [
            _frame(profile, module, phase)
            for module, phase in zip(part.module.tolist(), part.phase.tolist(), strict=True)
        ]
        for beside, rows in enumerate(nesting(part.start, part.end)):
            events = [
                {
                    "type": "O" if edge.begins else "C",
                    "at": edge.at - origin,
                    "frame": frames.setdefault(names[edge.row], len(frames)),
                }
                for edge in edges(rows, part.start, part.end)
            ]
            found.append(
                {
                    "type": "evented",
                    "name": f"compute {lane}" + (f" (crossing {beside})" if beside else ""),
                    "unit": "nanoseconds",
                    "startValue": events[0]["at"],
                    "endValue": events[-1]["at"],
                    "events": events,
                }
            )
    return found


def _frame(profile: Profile, module: int, phase: int) -> str:
    name = module_label(profile, module)
    return name if phase == Phase.FORWARD else f"{name} ({enum_label(Phase, phase)})"
